"""The training loop: step, log, save, evaluate, report.

There is one loop for every objective (config/objectives.py) and every layout.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

from megatron_mm import cli
from megatron_mm.config import RunConfig, to_dict
from megatron_mm.config.objectives import declaration, part_of
from megatron_mm.engine.feed import raise_together
from megatron_mm.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    EndOfData,
    NonFiniteError,
)
from megatron_mm.evaluation.evaluate import Results, evaluate, write_results
from megatron_mm.evaluation.examples import write_examples
from megatron_mm.evaluation.held_out import LOSS, held_out_losses, mean_loss
from megatron_mm.parallel.groups import Groups
from megatron_mm.report.metrics_log import MetricsLogger
from megatron_mm.report.page import accuracy_table, report_or_warn
from megatron_mm.train.stopping import stopping
from megatron_mm.train.trainer import Trainer

logger = logging.getLogger(__name__)


def train(run: RunConfig, groups: Groups) -> Trainer:
    """Trains to `train_iters`, evaluates, reports. Every rank calls it; errors are collective."""
    trainer = Trainer(run, groups)
    # The log is closed last: a view of it may wait for a service.
    with stopping(trainer.request_stop), ExitStack() as last, ExitStack() as at_end:
        at_end.callback(trainer.source.close)
        at_end.callback(trainer.saver.close)
        log = _open_outputs(trainer)
        last.callback(log.close)
        _before(trainer)
        try:
            finished = _steps(trainer, log)
        except BaseException as error:
            # Other errors of one rank find the others inside a collective.
            together = isinstance(error, (DataError, NonFiniteError))
            told = isinstance(error, (CheckpointError, DivergedError))
            if together or (groups.world.size() == 1 and not told):
                trainer.rescue()
            raise
        if finished:
            _finish(trainer, log)
    return trainer


def _before(trainer: Trainer) -> None:
    """Records what the report compares the trained model with, if the objective asks for it. A run
    that is resumed has it from its beginning."""
    run = trainer.run
    reported = declaration(run).before is not None and run.evaluation.report
    if reported and run.data.valid_data and not trainer.iteration:
        output = Path(run.logging.output_dir)
        part_of(run, "before")(
            trainer.engine, trainer.tokenizer, output, lambda: trainer.stop_requested
        )


def _open_outputs(trainer: Trainer) -> MetricsLogger:
    """Opens the log: better to fail now than hours later. The saver has tried its folder."""
    run, error = trainer.run, None
    log: MetricsLogger | None = None
    try:
        log = MetricsLogger(
            run.logging,
            to_dict(run),
            run.training.train_iters,
            trainer.iteration,
            enabled=trainer.is_logger,
            console=declaration(run).console,
        )
    except (OSError, ValueError) as problem:
        error = f"cannot write the run's output: {problem}"
    raise_together(trainer.groups, error)
    assert log is not None  # else there was an error
    return log


def _steps(trainer: Trainer, log: MetricsLogger) -> bool:
    """Trains until the end or a stop signal, saving as asked; whether the end was reached."""
    run, total = trainer.run, trainer.run.training.train_iters
    save_interval, eval_interval = run.checkpoint.save_interval, run.evaluation.eval_interval
    ended, due = False, False
    while trainer.iteration < total and not ended:
        try:
            metrics = trainer.step()
        except DataError as error:
            # A run that is queued again after its data have ended has its evaluation left.
            again = run.checkpoint.resume and trainer.saved == trainer.iteration
            ended = isinstance(error, EndOfData) and (again or trainer.iteration > trainer.begun)
            if not ended:
                raise
            logger.info("ending at step %d of %d: %s", trainer.iteration, total, error)
            break
        if metrics is None:
            break
        now = trainer.iteration
        try:
            # A rollout that found fewer prompts has fewer steps, and moves the later ones.
            due = due or bool(save_interval and now % save_interval == 0)
            if due and trainer.source.between:
                metrics["checkpoint/save_stall"] = trainer.save()
                due = False
        finally:
            log.log(now, metrics)  # a step that cannot be saved was done all the same
            if trainer.is_logger:
                log.table(now, trainer.source.table)
        ended = trainer.time_is_up()
        if eval_interval and now % eval_interval == 0 and now < total and not ended:
            results, _ = _evaluate(trainer)
            if results:
                log.log(now, _logged(results))
    if run.checkpoint.save and trainer.saved != trainer.iteration:
        trainer.save()
    elif trainer.iteration < total and not (ended or run.checkpoint.save):
        logger.info("stopped at step %d; nothing was saved", trainer.iteration)
    trainer.saver.finish()
    return ended or trainer.iteration >= total


def _finish(trainer: Trainer, log: MetricsLogger) -> None:
    """Makes what stands at the end: the last evaluation, where there are questions; the report, if
    it is asked for."""
    output, reported = Path(trainer.run.logging.output_dir), trainer.run.evaluation.report
    if trainer.run.data.valid_data and not _last_evaluation(trainer, log, output):
        trainer.stopped_by_another = not trainer.stop_requested
        return
    if trainer.is_logger and reported:
        for path in report_or_warn(output):
            cli.say(f"report: {path}")


def _last_evaluation(trainer: Trainer, log: MetricsLogger, output: Path) -> bool:
    """Writes results.json and, for the report, the examples behind it. Returns whether it was done:
    not if a rank was asked to stop."""
    engine = trainer.engine
    results, records = _evaluate(trainer)
    if not results:
        return False
    log.log(trainer.iteration, _logged(results))
    if trainer.is_logger:  # first, in case nothing can be written
        cli.say(accuracy_table({"skills": results}))
    write_results(
        engine,
        results,
        records,
        output,
        iteration=trainer.iteration,
        seconds=trainer.seconds,
    )
    if trainer.run.evaluation.report:
        write_examples(engine, trainer.tokenizer, records, output)
    return True


def _evaluate(trainer: Trainer) -> tuple[Results, list[dict]]:
    """Answers the held-out questions, and measures the loss of the rows' own answers; both empty
    if any rank was asked to stop."""
    given = trainer.engine, trainer.tokenizer, lambda: trainer.stop_requested
    losses = held_out_losses(*given)
    results, records = evaluate(*given)
    return {key: of | losses.get(key, {}) for key, of in results.items()}, records


def _logged(results: Results) -> dict[str, float]:
    found = {f"accuracy/{key}": result["accuracy"] for key, result in results.items()}
    loss = mean_loss(results)
    if loss is not None:
        found["valid/lm_loss"] = loss
    for key, result in results.items():
        if LOSS in result and len(results) > 1:
            found[f"valid/lm_loss/{key}"] = result[LOSS]
    return found

"""Every way out of a run tries to save the last whole step first.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_mm.engine.engine import Engine
from megatron_mm.errors import CheckpointError, DataError, NonFiniteError
from megatron_mm.parallel import groups
from megatron_mm.report.metrics_log import MetricsLogger
from megatron_mm.train import loop
from megatron_mm.train.trainer import Trainer
from support.fingerprints import parameter_hash
from support.trainers import LAYOUTS, TP2, digits_run

AT = 3  # the step before which the fault comes


class Fault:
    """Replaces a function by one that raises once `AT` steps are done."""

    def __init__(self, owner, name: str, error: BaseException | None, late: bool = False):
        self.owner, self.name, self.original = owner, name, getattr(owner, name)
        self.error, self.late, self.trainer = error, late, None

    def __enter__(self):
        fault, step = self, Trainer.step
        self.step = step

        def noted(trainer):
            fault.trainer = trainer
            return step(trainer)

        def faulty(*args, **keywords):
            if fault.trainer is None or fault.trainer.iteration < AT:
                return fault.original(*args, **keywords)
            if fault.late:
                fault.original(*args, **keywords)
            if fault.error is None:
                return math.nan
            raise fault.error

        Trainer.step = noted
        setattr(self.owner, self.name, faulty)
        return self

    def __exit__(self, *_):
        setattr(self.owner, self.name, self.original)
        Trainer.step = self.step


# The fault -> whether the three steps before it are saved.
ONE_RANK = {
    "an interrupt": (lambda: Fault(Engine, "forward_backward", KeyboardInterrupt()), True),
    "a bug": (lambda: Fault(Engine, "forward_backward", ZeroDivisionError()), True),
    "no memory": (lambda: Fault(Engine, "forward_backward", MemoryError()), True),
    "a bug before the update": (lambda: Fault(Engine, "learning_rate", RuntimeError("x")), True),
    # Its weights may be ruined: the checkpoints before it are what counts.
    "a norm that is not finite": (lambda: Fault(Engine, "gradient_norm", None), False),
    "a bug in the update": (lambda: Fault(Engine, "update", RuntimeError("x")), False),
    "a bug after the update": (lambda: Fault(Engine, "update", RuntimeError("x"), True), False),
    "a bug in the log": (lambda: Fault(MetricsLogger, "log", RuntimeError("x")), True),
    "an evaluation": (lambda: Fault(loop, "evaluate", DataError("rows.jsonl:3: x")), True),
    "a system exit": (lambda: Fault(Trainer, "time_is_up", SystemExit(3)), True),
}


def on_rank_faults(run, folder: Path) -> dict[str, tuple]:
    """Returns (the error's name, iteration and position that are saved, whether the parameters
    there are those of the fault's moment) of each fault."""
    made, found = groups.build(run.parallel), {}
    run.evaluation.eval_interval, run.evaluation.eval_samples = AT, 2
    for name, (fault, _) in ONE_RANK.items():
        run.checkpoint.save, run.checkpoint.load = str(folder / name), None
        run.logging.output_dir = str(folder / "out")
        with fault() as planted:
            try:
                loop.train(run, made)
                error = "none"
            except BaseException as problem:
                error = type(problem).__name__
        at_fault = parameter_hash(planted.trainer.engine)
        if not (folder / name / "latest").is_file():
            found[name] = (error, None)
            continue
        run.checkpoint.load = run.checkpoint.save
        again = Trainer(run, made)
        same = parameter_hash(again.engine) == at_fault
        found[name] = (error, again.iteration, again.loader.consumed_samples, same)
    return found


@pytest.fixture(scope="module")
def one_rank(ranks, scenes, tmp_path_factory):
    run = digits_run(scenes, train_iters=6)
    return ranks(1, on_rank_faults, run, tmp_path_factory.mktemp("ways"))[0]


@pytest.mark.parametrize("name", ONE_RANK)
def test_the_last_whole_step_is_saved(one_rank, name):
    error, *saved = one_rank[name]
    assert error != "none"
    # The batch of the step that failed is read again on resume.
    assert saved == ([AT, 4 * AT, True] if ONE_RANK[name][1] else [None]), (error, saved)


def on_rank_together(run, folder: Path) -> list[bool]:
    """Errors that all ranks have together, a norm that is not finite and an evaluation: whether the
    last whole step was saved."""
    made, found = groups.build(run.parallel), []
    run.evaluation.eval_interval, run.evaluation.eval_samples = AT, 2
    for name in ("a norm that is not finite", "an evaluation"):
        run.checkpoint.save = str(folder / name)
        with ONE_RANK[name][0](), pytest.raises((NonFiniteError, DataError)):
            loop.train(run, made)
        found.append((folder / name / "latest").is_file())
    return found


def test_what_ends_all_ranks_together_is_saved(ranks, scenes, tmp_path):
    run = digits_run(scenes, train_iters=6, output_dir=str(tmp_path / "out"), **TP2)
    for saved in ranks(2, on_rank_together, run, tmp_path):
        assert saved == [False, True]


def on_rank_cannot_save(run) -> str:
    """The error that ended the run is told, not that of the save."""
    made = groups.build(run.parallel)

    def broken(*_, **__):
        raise CheckpointError("cannot save: no space")

    with ONE_RANK["a bug"][0]():
        saver, loop.Trainer.save = loop.Trainer.save, broken
        try:
            loop.train(run, made)
        except BaseException as error:
            return type(error).__name__
        finally:
            loop.Trainer.save = saver
    return "none"


def test_a_save_that_fails_hides_no_error(ranks, scenes, tmp_path):
    settings = {"output_dir": str(tmp_path / "out"), "save": str(tmp_path / "saved")}
    run = digits_run(scenes, train_iters=6, valid_data=None, **settings)
    assert ranks(1, on_rank_cannot_save, run) == ["ZeroDivisionError"]


def on_rank_spike(run, folder: Path) -> tuple:
    """A loss that jumps at step 10: (steps held back, whether parameters stayed, the losses that
    the checkpoint holds)."""
    made = groups.build(run.parallel)
    trainer, held, stayed = Trainer(run, made), [], []
    reduced = trainer._reduced

    def jumping(*args):
        metrics = reduced(*args)
        if trainer.iteration == 9:
            metrics["train/lm_loss"] *= 50
        return metrics

    trainer._reduced = jumping
    run.checkpoint.save = str(folder / "saved")
    for _ in range(11):
        before, rate = parameter_hash(trainer.engine), trainer.engine.learning_rate()
        metrics = trainer.step()
        if metrics["train/held_back"]:
            held.append(trainer.iteration)
            stayed.append(parameter_hash(trainer.engine) == before)
            stayed.append(trainer.engine.learning_rate() != rate)  # the schedule goes on
        elif rate:  # 0 at the first step of a warm-up
            assert parameter_hash(trainer.engine) != before
    trainer.save()
    run.checkpoint.load = run.checkpoint.save
    again = Trainer(run, made)
    same = list(again.guard.losses) == list(trainer.guard.losses)
    return held, stayed, same, again.iteration


@pytest.mark.parametrize("name", ["one rank", "DP2"])
def test_a_spike_is_held_back(ranks, scenes, tmp_path, name):
    size, sizes = LAYOUTS[name]
    run = digits_run(scenes, loss_spike_factor=3.0, lr_warmup_iters=12, **sizes)
    for found in ranks(size, on_rank_spike, run, tmp_path):
        assert found == ([10], [True, True], True, 11)

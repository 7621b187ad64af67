"""A run between its steps: its engine, its position in the data, its checkpoints. A step reads,
agrees with the other ranks, runs forward and backward, checks and updates.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mm.checkpoint.folders import LATEST
from megatron_mm.checkpoint.parameters import finish_param_gather
from megatron_mm.checkpoint.saver import Saver
from megatron_mm.config import CheckpointConfig, RunConfig
from megatron_mm.config.objectives import declaration
from megatron_mm.convert.folder import NOTES
from megatron_mm.convert.token_notes import token_notes
from megatron_mm.data.batch import Microbatch
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import raise_together
from megatron_mm.engine.replicas import Replicas
from megatron_mm.engine.totals import KnownTotals
from megatron_mm.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from megatron_mm.evaluation.evaluate import open_questions
from megatron_mm.parallel.groups import Groups
from megatron_mm.report.metrics import Metrics, NotFinite, Total, own_totals, reduced
from megatron_mm.train.router_norms import RouterNorms
from megatron_mm.train.source import (
    Loader,
    StepSource,
    open_data,
    open_expert_scope,
    open_step_source,
)
from megatron_mm.train.spikes import SpikeGuard
from megatron_mm.train.start import (
    SCOPE,
    check_second_hops,
    loads_weights,
    resumed,
    scope_digest,
    start,
    tell_frozen,
)
from megatron_mm.train.stragglers import Stragglers

logger = logging.getLogger(__name__)

TRAINED = "train/trained_samples"  # rows that were not left out; not logged


def _goes_on_in_place(checkpoint: CheckpointConfig) -> bool:
    """Whether a run goes on from a checkpoint of the folder that it saves to, so that its first
    state is saved already."""
    if not checkpoint.load or not checkpoint.save or checkpoint.finetune:
        return False
    begun, folder = Path(checkpoint.load).resolve(), Path(checkpoint.save).resolve()
    return folder in (begun, begun.parent)


def _tell_earlier(folder: Path) -> None:
    """Warns if a folder holds checkpoints of a run that this one does not go on from."""
    latest = folder / LATEST
    if dist.get_rank() == 0 and latest.is_file():
        logger.warning(
            "%s holds %s of an earlier run, which this one's saves take the place of; --resume "
            "goes on from it, another --save keeps it",
            *(folder, latest.read_text().strip()[:40]),
        )


class Trainer:
    """A run: its engine, its data position, its log.

    Attributes:
        iteration: optimizer steps done.
        saved: the last of them that a checkpoint holds; None if none does.
    """

    def __init__(self, run: RunConfig, groups: Groups):
        run = resumed(run, groups)
        self.run, self.groups = run, groups
        self.tokenizer, loader = open_data(run, groups)
        torch.manual_seed(run.training.seed)
        self.engine = Engine.create(
            run,
            groups,
            drawn=not loads_weights(run.checkpoint),
            expert_scope=open_expert_scope(run, groups),
        )
        if run.data.valid_data:  # a bad file is better known now than at the first evaluation
            open_questions(self.engine, self.tokenizer, check=True)
        self.source: StepSource = open_step_source(run, self.engine, self.tokenizer, loader)
        tell_frozen(run)
        self.router_norms = RouterNorms(self.engine)
        tokens = token_notes(run, self.tokenizer)
        begun = start(self.engine, loader, run.checkpoint, tokens)
        if begun.iteration < run.training.train_iters:
            check_second_hops(self.engine)
        self.engine.at_progress()
        self.iteration, self.seconds = begun.iteration, begun.seconds
        self.notes = begun.notes | tokens
        self.saver = Saver(
            self.engine,
            asynchronous=run.checkpoint.async_save,
            keep_last=run.checkpoint.keep_last_checkpoints,
            folder=Path(run.checkpoint.save) if run.checkpoint.save else None,
        )
        self.known = KnownTotals()
        self.replicas = Replicas(self.engine)
        self.stragglers = Stragglers(groups)
        self.guard = SpikeGuard(run.training.loss_spike_factor, begun.losses)
        self.begun = self.iteration
        self.saved = self.iteration if _goes_on_in_place(run.checkpoint) else None
        if run.checkpoint.save and self.saved is None:
            _tell_earlier(Path(run.checkpoint.save))
        # The position in the data after the last whole step; None where it cannot be saved.
        self.position: dict | None = None
        self.opened = time.monotonic()
        self.stop_requested = False  # of this rank
        self.stopped_by_another = False
        self.not_finite: NonFiniteError | None = None  # the last step's

    @property
    def loader(self) -> Loader:
        return self.source.loader

    @property
    def is_logger(self) -> bool:
        return dist.get_rank() == 0

    def request_stop(self, *_) -> None:
        """Asks to save after the current step, then leave."""
        self.stop_requested = True

    def step(self) -> dict[str, float] | None:
        """Runs one optimizer step; returns its metrics, or None if some rank was asked to stop
        before it.

        Raises:
            DataError: a row is bad (on every rank).
            NonFiniteError: before the update (on every rank). Nothing is saved after it.
        """
        try:
            return self._step()
        except NonFiniteError as error:
            self.not_finite = error
            raise

    def _step(self) -> dict[str, float] | None:
        begin = time.perf_counter()
        self.position = self.loader.state_dict() if self.source.between else None
        if self.saver.failed:
            self.request_stop()  # seen by all ranks at this step; saving once more says why
        batches, stopping = self.source.next_step(self.stop_requested)
        if stopping:
            self.stopped_by_another = not self.stop_requested
            return None
        losses = self.engine.forward_backward(batches, self.source.objective)
        metrics = self._reduced(losses, batches) | self.source.metrics
        norm = self.engine.gradient_norm()
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"gradient norm {norm} at iteration {self.iteration + 1}: nothing was updated; "
                f"the batch was {self._rows_of(batches)}"
            )
        metrics |= self.router_norms.measure()
        metrics["train/learning_rate"] = self.engine.learning_rate()
        every = self.run.training.check_weight_hash_across_dp_replicas_interval
        if every and (self.iteration == self.begun or self.iteration % every == 0):
            self.replicas.check(self.iteration)
        self._update(norm, metrics)
        metrics |= self.stragglers.look(self.iteration)
        self.seconds += time.perf_counter() - begin
        return metrics | {
            "train/grad_norm": norm,
            "perf/iteration_time": time.perf_counter() - begin,
        }

    def _guarded(self, metrics: dict[str, float]) -> float:
        """The loss that is guarded against spikes, as `Declaration.console` names it first."""
        shown = declaration(self.run).console
        if not shown or shown[0] not in metrics:
            known = ", ".join(sorted(name for name in metrics if name.startswith("train/")))
            raise ConfigError(
                f"loss_spike_factor guards the first name in the `console` of objective "
                f"{self.run.training.objective!r}, {shown[0] if shown else 'none'}, which its "
                f"steps do not report; they report {known}"
            )
        return metrics[shown[0]]

    def _update(self, norm: float, metrics: dict[str, float]) -> None:
        """Updates the parameters, unless the guard holds the step back; counts it in any case."""
        objection = None
        if self.run.training.loss_spike_factor:
            objection = self.guard.objection(self._guarded(metrics))
            metrics["train/held_back"] = float(objection is not None)
        self.position = None  # half a step cannot be saved
        if objection is None:
            self.engine.update(norm)
            self.source.stepped(metrics)
        else:
            logger.warning("step %d: %s", self.iteration + 1, objection)
            self.engine.pass_over()
        self.iteration += 1
        self.position = self.loader.state_dict() if self.source.between else None

    def _reduced(self, parts: Sequence[Metrics], batches: Sequence[Microbatch]) -> dict[str, float]:
        """The metrics of the step over all microbatches and ranks; the same on every rank.

        Raises:
            NonFiniteError: on every rank, if the loss of any microbatch anywhere is not finite.
            DataError: on every rank, if every row of the step was left out.
        """
        totals, problem = own_totals([*parts, self._counts(batches)])
        reasons: list[str] = []
        skipped = [why for batch in batches for why in batch.skipped][:3]
        skipped = skipped if self.groups.is_reader else []
        everywhere = self.known.gather(totals, wrong=problem is not None or bool(skipped))
        if everywhere is None:
            text = None if problem is None else self._text(problem, batches)
            everywhere, reasons = self._told((totals, text, skipped))
        metrics = reduced(everywhere)
        if not metrics.pop(TRAINED):
            raise DataError(f"every row of a step was left out, the first because: {reasons[0]}")
        return metrics

    def _told(
        self, note: tuple[dict[str, Total], str | None, list[str]]
    ) -> tuple[list[dict[str, Total]], list[str]]:
        """Returns (the totals of every rank, the reasons for which rows were left out) from what
        each rank says in words.

        Raises:
            NonFiniteError: on every rank, if any has such a problem.
        """
        notes: list = [None] * self.groups.world.size()
        dist.all_gather_object(notes, note, group=self.groups.world)
        problems = [problem for _, problem, _ in notes if problem]
        if problems:
            raise NonFiniteError(problems[0])
        reasons = [reason for _, _, some in notes for reason in some]
        if reasons:
            logger.info("left out: %s", "; ".join(reasons[:3]))
        everywhere = [totals for totals, _, _ in notes]
        self.known.learn(everywhere)
        return everywhere, reasons

    def _counts(self, batches: Sequence[Microbatch]) -> Metrics:
        """Counts what was read; only readers know."""
        metrics = Metrics()
        if self.groups.is_reader:
            metrics.sum("train/tokens", sum(batch.num_real_tokens for batch in batches))
            metrics.sum("train/skipped_samples", sum(len(batch.skipped) for batch in batches))
            metrics.sum(TRAINED, sum(len(batch.samples) for batch in batches))
        if dist.get_rank() == 0:
            metrics.sum("train/consumed_samples", self.loader.consumed_samples)
        return metrics

    def _text(self, problem: NotFinite, batches: Sequence[Microbatch]) -> str:
        return (
            f"{problem.name} {problem.value} at iteration {self.iteration + 1}: nothing was "
            f"updated; the microbatch was {', '.join(batches[problem.part].samples)}"
        )

    def _rows_of(self, batches: Sequence[Microbatch], most: int = 8) -> str:
        """Names the first rows of the step over all replicas. Every rank calls it."""
        mine = [row for batch in batches for row in batch.samples if self.groups.is_reader]
        parts: list = [None] * self.groups.world.size()
        dist.all_gather_object(parts, mine, group=self.groups.world)
        rows = [row for part in parts for row in part]
        more = f" and {len(rows) - most} more" if len(rows) > most else ""
        return ", ".join(rows[:most]) + more

    def time_is_up(self) -> bool:
        """Whether `exit_duration_in_mins` are over on any rank, since it was ready to train. Every
        rank calls it."""
        limit = self.run.training.exit_duration_in_mins
        if limit is None or not self.source.between:
            return False
        return raise_together(self.groups, None, time.monotonic() - self.opened >= 60 * limit)

    def save(self, position: dict | None = None) -> float:
        """Saves, or starts to (`async_save`); returns the seconds for which training paused.

        Args:
            position: in the data; None: the loader's.

        Raises:
            CheckpointError: on every rank; this save or the one before failed, or the last step's
                loss or gradient was not finite, so that the weights may be ruined.
            DivergedError: on every rank; copies of a parameter differ.
        """
        if self.not_finite is not None:
            raise CheckpointError(
                f"cannot save iteration {self.iteration}: {self.not_finite}; earlier checkpoints "
                "are kept: go on from one of them"
            )
        save = self.run.checkpoint.save
        assert save is not None, "a run without `save` has nowhere to save to"
        if self.run.training.check_weight_hash_across_dp_replicas_interval:
            finish_param_gather(self.engine)
            self.replicas.check(self.iteration)
        extra = {"seconds": self.seconds, "data": self.loader.order, NOTES: self.notes}
        extra["objective"] = self.run.training.objective
        extra[SCOPE] = scope_digest(self.engine)
        if self.guard.factor:
            extra["losses"] = [*self.guard.losses]
        state = self.loader.state_dict() if position is None else position
        seconds = self.saver.save(state, Path(save), self.iteration, extra)
        self.saved = self.iteration
        return seconds

    def rescue(self) -> None:
        """Saves the last whole step while an error is on its way, if that is not saved yet; that it
        failed is only logged. Every rank calls it."""
        try:
            self.saver.finish()
        except (Exception, CheckpointException) as error:
            logger.warning("%s", error)
            self.saved = None  # what was being written is lost
        known = self.iteration in (self.begun, self.saved)
        if not self.run.checkpoint.save or known or self.position is None:
            return
        try:
            self.save(self.position)
            self.saver.finish()
        # Whatever it is, it must not hide the error that ends the run.
        except (Exception, CheckpointException) as error:
            logger.warning("nothing was saved: %s", error)

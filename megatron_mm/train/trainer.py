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

from megatron_mm.checkpoint.saver import Saver
from megatron_mm.config import RunConfig
from megatron_mm.convert.folder import NOTES
from megatron_mm.data.batch import Microbatch
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import raise_together
from megatron_mm.engine.totals import KnownTotals
from megatron_mm.errors import DataError, NonFiniteError
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
from megatron_mm.train.start import (
    SCOPE,
    loads_weights,
    resumed,
    scope_digest,
    start,
    tell_frozen,
)

logger = logging.getLogger(__name__)

TRAINED = "train/trained_samples"  # rows that were not left out; not logged


class Trainer:
    """A run: its engine, its data position, its log.

    Attributes:
        iteration: optimizer steps done.
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
            open_questions(self.engine, self.tokenizer)
        self.source: StepSource = open_step_source(run, self.engine, self.tokenizer, loader)
        tell_frozen(run)
        self.router_norms = RouterNorms(self.engine)
        image_token = self.tokenizer.image_context_id
        begun = start(self.engine, loader, run.checkpoint, image_token)
        self.iteration, self.seconds = begun.iteration, begun.seconds
        self.notes = begun.notes | {"image_token_id": image_token}
        self.saver = Saver(
            self.engine,
            asynchronous=run.checkpoint.async_save,
            keep_last=run.checkpoint.keep_last_checkpoints,
        )
        self.known = KnownTotals()
        self.stop_requested = False

    @property
    def loader(self) -> Loader:
        return self.source.loader

    @property
    def is_logger(self) -> bool:
        return dist.get_rank() == 0

    def request_stop(self, *_) -> None:
        """SIGTERM: save after the current step, then leave."""
        self.stop_requested = True

    def step(self) -> dict[str, float] | None:
        """Runs one optimizer step; returns its metrics, or None if some rank was asked to stop
        before it.

        Raises:
            DataError: a row is bad (on every rank).
            NonFiniteError: before the update (on every rank).
        """
        begin = time.perf_counter()
        if self.saver.failed:
            self.request_stop()  # seen by all ranks at this step; saving once more says why
        batches, stopping = self.source.next_step(self.stop_requested)
        if stopping:
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
        self.engine.update(norm)
        self.source.stepped(metrics)
        self.iteration += 1
        self.seconds += time.perf_counter() - begin
        return metrics | {
            "train/grad_norm": norm,
            "perf/iteration_time": time.perf_counter() - begin,
        }

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
        """Whether any rank has trained for `exit_duration_in_mins`. Every rank calls it."""
        limit = self.run.training.exit_duration_in_mins
        if limit is None or not self.source.between:
            return False
        return raise_together(self.groups, None, self.seconds >= 60 * limit)

    def save(self) -> float:
        """Saves, or starts to (`async_save`); returns the seconds for which training paused."""
        save = self.run.checkpoint.save
        assert save is not None, "a run without `save` has nowhere to save to"
        folder = Path(save)
        extra = {"seconds": self.seconds, "data": self.loader.order, NOTES: self.notes}
        extra["objective"] = self.run.training.objective
        extra[SCOPE] = scope_digest(self.engine)
        return self.saver.save(self.loader.state_dict(), folder, self.iteration, extra)

"""Supervised fine-tuning: cross entropy over answers, and steps made of rows as they are. With a
skill map its routers may be aligned (aligned.py); it may mimic a teacher (../mimic)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm import platform
from megatron_mm.config import RunConfig, token_multiple
from megatron_mm.config.objectives import part_of
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.loading.loader import TrainLoader
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.earl.alignment import Alignment
from megatron_mm.earl.router_term import router_term
from megatron_mm.earl.settings import EARLConfig
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import receive_step
from megatron_mm.engine.objective import Objective
from megatron_mm.mimic.batch import MimicBatch
from megatron_mm.mimic.distillation import divergences
from megatron_mm.mimic.loader import MimicLoader
from megatron_mm.mimic.settings import MimicConfig
from megatron_mm.mimic.teaching import Teaching, mimics, teaches_routers
from megatron_mm.model.layers.output import Predictions
from megatron_mm.model.routing import RouterTerm
from megatron_mm.report.metrics import Metrics
from megatron_mm.train.aligned import Aligner, LabelledLoader


def plain(run: RunConfig) -> bool:
    """Whether a run's loss is the cross entropy of its rows' answers and nothing else."""
    aligned = run.section(EARLConfig).router_align_coeff
    return run.training.objective == "sft" and not aligned and not mimics(run)


class SupervisedFineTuning:
    """Cross entropy of the next token over the assistant's turns."""

    router_term: RouterTerm | None = None
    kd_coeff = 0.0  # of the divergence from a teacher's next tokens

    def __init__(self, run: RunConfig | None = None):
        if run is None:
            return
        if run.section(EARLConfig).router_align_coeff or teaches_routers(run):
            self.router_term = router_term
        self.kd_coeff = run.section(MimicConfig).mimic_kd_coeff

    def positions(self, batch: Microbatch) -> torch.Tensor:
        return batch.supervised

    def loss(
        self,
        predictions: Predictions,
        batch: Microbatch,
        positions_K: torch.Tensor,
        pg: ProcessGroupCollection,
        metrics: Metrics,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = platform.moved(positions_K, predictions.device)
        mask_K = batch.loss_mask_T[rows]
        losses_K = -predictions.logprobs(batch.labels_T[rows])
        total, count = (losses_K * mask_K).sum(), mask_K.sum()
        metrics.ratio("train/lm_loss", total, count)
        if self.kd_coeff and isinstance(batch, MimicBatch) and batch.teacher_answers is not None:
            known = [held[rows] for held in batch.teacher_answers]
            distilled = (divergences(predictions, known[0].long(), known[1]) * mask_K).sum()
            metrics.ratio("train/kd_loss", distilled, count)
            total = total + self.kd_coeff * distilled
        return total, count.int()


class Supervised:
    """The steps of an objective over rows with their answers."""

    def __init__(self, run: RunConfig, engine: Engine, tokenizer: Tokenizer, loader: TrainLoader):
        del tokenizer
        self.groups, self.loader = engine.groups, loader
        self.objective: Objective = part_of(run, "objective")(run)
        self.aligner = None
        if coefficient := run.section(EARLConfig).router_align_coeff:
            assert isinstance(loader, LabelledLoader)  # the coefficient is rejected without a map
            self.aligner = Aligner(self.groups, self.objective, loader, coefficient)
        self.teaching = None
        if mimics(run):
            self.teaching = Teaching(run, engine, self.objective, loader)
        self.between = True
        self.metrics: dict[str, float] = {}
        self.table: list[dict[str, Any]] = []

    def next_step(self, stop: bool) -> tuple[Sequence[Microbatch], bool]:
        batches, stopping = receive_step(self.groups, self.loader, stop)
        if self.aligner is not None and not stopping:
            batches = self.aligner.targets(batches)
        if self.teaching is not None and not stopping:
            batches = self.teaching.targets(batches)
        return batches, stopping

    def stepped(self, metrics: Mapping[str, float]) -> None:
        """Takes nothing from a step."""

    def close(self) -> None:
        self.loader.close()


class SeenLoader(MimicLoader, TrainLoader):
    """Loads rows with what a teacher recorded for them."""


class LabelledSeenLoader(MimicLoader, LabelledLoader):
    """Loads rows with the skills of their positions and what a teacher recorded for them."""


def open_rows(
    run: RunConfig, tokenizer: Tokenizer, *, data_parallel_rank: int, data_parallel_size: int
) -> TrainLoader:
    """The training data of one replica, padded for the run's layout; with a skill map, labelled;
    with a teacher, as it recorded them.

    Raises:
        DataError: for unusable settings or files.
        RLError: for a skill map or a labeller that cannot be used.
    """
    alignment, seen = Alignment.of(run), bool(run.section(MimicConfig).mimic_routes)
    make: Callable[..., TrainLoader] = SeenLoader if seen else TrainLoader
    if alignment is not None:
        make = partial(LabelledSeenLoader if seen else LabelledLoader, alignment)
    return make(
        run,
        tokenizer,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
        pad_multiple=token_multiple(run),
    )

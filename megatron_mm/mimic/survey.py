"""Compares a student's routers with a teacher's on recorded rows: sums that layers are matched and
experts are mapped by. On any layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_mm.config import hops
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.sample import Sample
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.engine.engine import Engine
from megatron_mm.mimic.batch import MimicBatch, TopExperts
from megatron_mm.mimic.layer_match import CrossSums
from megatron_mm.mimic.loader import with_teacher
from megatron_mm.mimic.rounds import Rows, read_rounds
from megatron_mm.mimic.route_file import RouteFile
from megatron_mm.mimic.targets import whole_distribution
from megatron_mm.parallel.sequence import take
from megatron_mm.report.metrics import Metrics


@dataclass(frozen=True)
class _Counter:
    """A `model.routing.RouterTerm` that adds up products and teaches nothing. Every rank of a stage
    has other positions, every stage other layers, every replica other rows."""

    sums: CrossSums
    routes: RouteFile
    layers: Sequence[int]  # of the student, all of them
    new: frozenset[tuple[str, ...]]  # samples of the microbatches that count

    def __call__(
        self,
        logits_tE: torch.Tensor,
        batch: Microbatch,
        moe_index: int,
        positions: range,
        metrics: Metrics,
    ) -> None:
        if tuple(batch.samples) not in self.new:
            return
        assert isinstance(batch, MimicBatch)
        mask_t = take(batch.loss_mask_T, positions) > 0
        teacher = [
            whole_distribution(
                TopExperts(*(take(x, positions)[mask_t] for x in batch.teacher_routes[layer])),
                self.routes.teacher.num_experts,
            ).cpu()
            for layer in self.routes.layers
        ]
        number = self.layers.index(moe_index)
        if not number:  # once: the teacher is the same at every layer of the student
            self.sums.add_teacher(teacher)
        own_tE = logits_tE[mask_t].float().softmax(1).cpu()
        self.sums.add_student(number, own_tE, teacher)


def survey(engine: Engine, tokenizer: Tokenizer, rows: Rows, routes: RouteFile) -> CrossSums:
    """Returns the sums over the supervised positions of rows, the same on every rank. Every rank of
    the job calls it.

    Raises:
        DataError: on every rank, if a row is bad or was not recorded.
    """

    def see(row: Mapping[str, Any], where: str, sample: Sample) -> Any:
        return routes.aligned(row, where, sample, tokenizer, answers=False)

    def join(batch: Microbatch, seen: Sequence[Any]) -> Microbatch:
        return with_teacher(batch, seen, routes)

    language = engine.run.model.language
    layers = [*hops(engine.run.model)]
    theirs = len(routes.layers), routes.teacher.num_experts
    sums = CrossSums.zeros(theirs, (len(layers), language.num_experts))
    nowhere = torch.zeros(0, dtype=torch.int64)
    engine.training(False)
    for batches, new in read_rounds(engine, tokenizer, rows, see, join):
        counted = frozenset(
            tuple(batch.samples) for batch, counts in zip(batches, new, strict=True) if counts
        )
        counter = _Counter(sums, routes, layers, counted)
        engine.forward(batches, lambda batch: nowhere, lambda *_, **__: None, router_term=counter)
    engine.training(True)
    for part in sums.parts:
        dist.all_reduce(part, group=engine.groups.world)
    return sums

"""Counts the experts that the tokens of a probe took.

The token counted with a position is the one that stands there, since that is what the router saw.
Routes stay on the ranks of their layers and positions; ranks exchange only counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.earl.make_map import Tally, on_layers
from megatron_mm.earl.probe import OpenProbe, ProbeBatch, read_round
from megatron_mm.earl.route_counts import RouteCounts, count_routes
from megatron_mm.engine.engine import Engine
from megatron_mm.parallel.sequence import shard, take


@dataclass(frozen=True)
class ProbeCounts:
    """The route counts of a probe, on rank 0; on other ranks the lists are empty.

    Attributes:
        halves: of every other row, and of the rest.
        shuffled: of all rows, with the skills shuffled among rows; one for each shuffle.
        unlabelled_HLE: int64 [2, L, E]: how often positions without a skill chose each expert, in
            each half.
    """

    halves: list[RouteCounts]
    shuffled: list[RouteCounts]
    unlabelled_HLE: torch.Tensor


def count_probe(engine: Engine, tokenizer: Tokenizer, opened: OpenProbe) -> ProbeCounts:
    """Reads and counts a probe. Every rank of the job calls it.

    Raises:
        DataError: on every rank, if a row is bad.
    """
    groups, plan = engine.groups, opened.plan
    tallies = [Tally() for _ in range(2 + plan.shuffles)]
    sizes = engine.config.num_layers, engine.run.model.language.num_experts
    unlabelled_HLE = torch.zeros(2, *sizes, dtype=torch.int64)
    engine.training(False)
    for number in range(opened.rounds):
        batches = read_round(engine, tokenizer, opened, number)
        for one, routes_tLk in zip(batches, _routes(engine, batches), strict=True):
            here = sorted(routes_tLk)
            if not here:
                continue
            routes = torch.stack([routes_tLk[index] for index in here], 1)
            counts = _count(engine, one, routes, here, plan.skills)
            for tally, found in zip([tallies[one.half], *tallies[2:]], counts, strict=True):
                tally.add(found)
            unlabelled_HLE[one.half, here] += _unlabelled(engine, one, routes)
    engine.training(True)
    dist.all_reduce(unlabelled_HLE, group=groups.world)
    parts: list | None = [None] * groups.world.size() if dist.get_rank() == 0 else None
    dist.gather_object([tally.total() for tally in tallies], parts, dst=0, group=groups.world)
    if parts is None:
        return ProbeCounts([], [], unlabelled_HLE)
    totals: list[RouteCounts] = []
    for of_tally in zip(*parts, strict=True):
        merged = Tally(waiting=[c for c in of_tally if c is not None]).total()
        assert merged is not None  # every tally has counted rows
        totals.append(merged)
    return ProbeCounts(totals[:2], totals[2:], unlabelled_HLE)


def _routes(engine: Engine, batches: list[ProbeBatch]) -> list[dict[int, torch.Tensor]]:
    """Returns the first hop's routes of this rank's layers at its positions, for each microbatch:
    MoE index -> int16 [t, k], on the CPU; empty on a rank without layers."""
    records: list[dict] = [{} for _ in batches]
    nowhere = torch.zeros(0, dtype=torch.int64)
    engine.forward(
        [one.batch for one in batches],
        lambda batch: nowhere,
        lambda *_, **__: None,
        routes=records,
    )
    k = engine.run.model.language.moe_router_topk
    return [{index: routes[:, :k].cpu() for index, routes in record.items()} for record in records]


def _count(
    engine: Engine,
    one: ProbeBatch,
    routes_tLk: torch.Tensor,
    here: list[int],
    skills: list[str],
) -> list[RouteCounts]:
    """Counts the routes of this rank's layers (`here`) at its positions, for each labelling."""
    language, mine = engine.run.model.language, shard(len(one.batch.tokens_T), engine.groups.pg)
    token_t = take(one.batch.tokens_T, mine)
    sizes = language.num_experts, len(skills), language.vocab_size
    return [
        on_layers(
            count_routes(routes_tLk, take(skill_T, mine), token_t, *sizes),
            here,
            engine.config.num_layers,
        )
        for skill_T in one.skill_JT.long()
    ]


def _unlabelled(engine: Engine, one: ProbeBatch, routes_tLk: torch.Tensor) -> torch.Tensor:
    """Returns int64 [layers of this rank, E]: how often its positions without a skill chose each
    expert."""
    experts = engine.run.model.language.num_experts
    free_T = one.skill_JT[0] < 0
    free_T[one.real :] = False
    free_t = take(free_T, shard(len(free_T), engine.groups.pg))
    return torch.stack(
        [
            torch.bincount(chosen.flatten().long(), minlength=experts)
            for chosen in routes_tLk[free_t].unbind(1)
        ]
    )

"""The places that completions have looked at, from all stages of a replica."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_mm.config.layers.queries import query_settings
from megatron_mm.engine.engine import Engine
from megatron_mm.generation.lanes import Completion

Looked = list[list[list[float]]]  # of a completion: query, glimpse, (y, x, scale)


def gather_looked(engine: Engine, completions: Sequence[Completion]) -> list[Looked] | None:
    """Returns, on the replica's reader, where each completion looked: for every query the place
    [y, x, scale] of each glimpse, in shares of the image and in the order of the layer pattern;
    elsewhere nothing. None for a model that does not glimpse. Every rank of the replica calls
    it."""
    if query_settings(engine.run.model) is None:
        return None
    groups, mine = engine.groups, None
    pairs = sorted(int(pair) for chunk in engine.chunks for pair in chunk.language.queries)
    if groups.pg.tp_cp.rank() == 0 and pairs:
        mine = pairs, [completion.looked_NQ3 for completion in completions]
    parts: list = [None] * groups.replica.size()
    dist.gather_object(mine, parts if groups.is_reader else None, group=groups.replica, group_dst=0)
    if not groups.is_reader:
        return []
    parts = [part for part in parts if part]
    order = torch.tensor([pair for pairs, _ in parts for pair in pairs]).argsort()
    return [
        torch.cat(of_one, 1)[:, order].tolist()
        for of_one in zip(*(looked for _, looked in parts), strict=True)
    ]

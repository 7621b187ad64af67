"""Greedy decoding that runs the whole sequence again for every token, on any layout.

It is slow and simple; generation/generate.py is tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist

from megatron_mm.config import token_multiple
from megatron_mm.data.batch import Microbatch
from megatron_mm.engine.engine import Engine
from megatron_mm.generation.generate import last_positions
from megatron_mm.model.layers.output import Predictions
from megatron_mm.parallel.groups import Groups
from support.grown import with_answers


def _greedy(
    predictions: Predictions, batch: Microbatch, positions: torch.Tensor, groups: Groups
) -> torch.Tensor:
    """Returns the best next token of each sample, int64 [samples]; ties go to the lower id."""
    pg, last, logits_KV = groups.pg, last_positions(batch), predictions.logits().float()
    values, ids = logits_KV.max(-1)
    best = values.new_full((len(last),), -torch.inf)
    index = torch.zeros_like(best, dtype=torch.int64)
    # Another context-parallel rank may hold the end of a sample; its token is unknown here.
    here, wanted = torch.isin(last, positions), torch.isin(positions, last)
    best[here], index[here] = values[wanted], ids[wanted] + pg.tp.rank() * logits_KV.shape[-1]
    if pg.tp_cp.size() == 1:
        return index
    bests, indices = ([torch.empty_like(x) for _ in range(pg.tp_cp.size())] for x in (best, index))
    dist.all_gather(bests, best, group=pg.tp_cp)
    dist.all_gather(indices, index, group=pg.tp_cp)
    winner = torch.stack(bests).argmax(0, keepdim=True)
    return torch.stack(indices).gather(0, winner)[0]


def generate(
    engine: Engine,
    prompts: Sequence[Microbatch],
    *,
    stop_id: int,
    pad_id: int,
    max_new_tokens: int,
) -> list[torch.Tensor]:
    """Returns the answers [N, G] of each microbatch; it ends when every answer has a stop_id.

    Pads follow a stop. Every rank of the job calls it with the same number of microbatches: with
    expert parallelism all replicas take part in each forward pass.
    """
    groups = engine.groups
    answers = [torch.empty(len(p.cu_seqlens) - 1, 0, dtype=torch.int64) for p in prompts]
    done = [torch.zeros(len(a), dtype=torch.bool) for a in answers]
    # Within the replica, the first rank of the last stage.
    last = groups.replica.size() - groups.replica.size() // groups.pg.pp.size()
    for _ in range(max_new_tokens):
        batches = [
            with_answers(p, a, pad_id, token_multiple(engine.run))
            for p, a in zip(prompts, answers, strict=True)
        ]
        found = engine.forward(batches, last_positions, partial(_greedy, groups=groups))
        active = torch.zeros(1, dtype=torch.int64)
        for i in range(len(prompts)):
            token = found[i].cpu() if groups.is_last_stage else torch.empty(len(done[i])).long()
            dist.broadcast(token, group=groups.replica, group_src=last)
            token = torch.where(done[i], pad_id, token)
            done[i] |= token == stop_id
            answers[i] = torch.cat((answers[i], token.unsqueeze(1)), 1)
            active += (~done[i]).sum()
        dist.all_reduce(active, group=groups.world)
        if not active:
            break
    return answers

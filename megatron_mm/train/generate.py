"""Greedy decoding by running the whole sequence again for every token, on any layout.

Slow and plainly right: the cached decoder of the RL rollouts is tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from megatron_mm.config import token_multiple
from megatron_mm.data.batch import Microbatch
from megatron_mm.parallel.groups import Groups
from megatron_mm.train.engine import Engine


def with_answers(
    prompts: Microbatch, answers_NG: torch.Tensor, pad_id: int, pad_multiple: int
) -> Microbatch:
    """The prompts, each followed by its G answer tokens, as a new microbatch.

    Args:
        prompts: N samples without padding tail.
        answers_NG: int64.
    """
    count, grown = answers_NG.shape
    lengths = prompts.cu_seqlens.diff()
    sample = torch.arange(count).repeat_interleave(lengths)
    shift = torch.arange(count) * grown  # what stands before sample n has grown this much

    def moved(positions: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        return positions + shift[owner]

    total = int(prompts.cu_seqlens[-1]) + count * grown
    tail = -total % pad_multiple
    tokens = torch.full((total + tail,), pad_id, dtype=torch.int64)
    positions = torch.zeros(total + tail, dtype=torch.int64)
    old = torch.arange(len(sample))
    tokens[moved(old, sample)] = prompts.tokens_T
    positions[moved(old, sample)] = prompts.position_ids_T
    new = (prompts.cu_seqlens[1:] + shift).unsqueeze(1) + torch.arange(grown)
    tokens[new] = answers_NG
    positions[new] = lengths.unsqueeze(1) + torch.arange(grown)
    cu_seqlens = prompts.cu_seqlens + torch.arange(count + 1) * grown
    if tail:
        positions[total:] = torch.arange(tail)
        cu_seqlens = torch.cat((cu_seqlens, cu_seqlens[-1:] + tail))
    visible = prompts.memory_visible_M2
    owner = torch.searchsorted(prompts.cu_seqlens[1:].contiguous(), visible[:, 1].contiguous())
    visible = torch.stack((moved(visible[:, 0], owner), moved(visible[:, 1], owner) + grown), 1)
    return replace(
        prompts,
        tokens_T=tokens,
        labels_T=torch.zeros_like(tokens),
        loss_mask_T=torch.zeros(total + tail),
        position_ids_T=positions,
        cu_seqlens=cu_seqlens,
        num_real_tokens=total,
        stream_positions=moved(prompts.stream_positions, sample[prompts.stream_positions]),
        memory_visible_M2=visible,
    )


def last_positions(batch: Microbatch) -> torch.Tensor:
    """Where the next token of each sample is predicted; the padding tail is no sample."""
    ends = batch.cu_seqlens[1:]
    return ends[ends <= batch.num_real_tokens] - 1


def _greedy(
    logits_K1V: torch.Tensor, batch: Microbatch, positions: torch.Tensor, groups: Groups
) -> torch.Tensor:
    """int64 [samples]: the best next token of each sample; ties go to the lower id."""
    pg, last = groups.pg, last_positions(batch)
    values, ids = logits_K1V[:, 0].float().max(-1)
    best = values.new_full((len(last),), -torch.inf)
    index = torch.zeros_like(best, dtype=torch.int64)
    # Of a sample whose end another context-parallel rank holds, nothing is known here.
    here, wanted = torch.isin(last, positions), torch.isin(positions, last)
    best[here], index[here] = values[wanted], ids[wanted] + pg.tp.rank() * logits_K1V.shape[-1]
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
    """Answers [N, G] of each microbatch, cut after stop_id is everywhere; pads follow a stop.

    Every rank of the job calls it with as many microbatches as the others: with expert
    parallelism the forward passes of all replicas belong together.
    """
    groups = engine.groups
    answers = [torch.empty(len(p.cu_seqlens) - 1, 0, dtype=torch.int64) for p in prompts]
    done = [torch.zeros(len(a), dtype=torch.bool) for a in answers]
    # In the replica: the first rank of the last stage.
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

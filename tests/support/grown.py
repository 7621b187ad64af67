"""Appends answers to microbatches of prompts, for references that run whole sequences again."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_mm.data.batch import Microbatch


def with_answers(
    prompts: Microbatch, answers_NG: torch.Tensor, pad_id: int, pad_multiple: int
) -> Microbatch:
    """Returns a microbatch of the prompts, each followed by its G answer tokens.

    Args:
        prompts: N samples without padding tail.
        answers_NG: int64 [N, G].
        pad_multiple: the length of the stream is padded to a multiple of it.
    """
    count, grown = answers_NG.shape
    lengths = prompts.cu_seqlens.diff()
    sample = torch.arange(count).repeat_interleave(lengths)
    shift = torch.arange(count) * grown  # tokens added before sample n

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
    asked = prompts.queries.positions_N
    ends, memories = prompts.cu_seqlens[1:].contiguous(), {}
    for name, memory in prompts.memories.items():
        first, last = memory.visible_M2.unbind(1)
        owner = torch.searchsorted(ends, last.contiguous())
        visible = torch.stack((moved(first, owner), moved(last, owner) + grown), 1)
        memories[name] = replace(memory, visible_M2=visible)
    return replace(
        prompts,
        tokens_T=tokens,
        labels_T=torch.zeros_like(tokens),
        loss_mask_T=torch.zeros(total + tail),
        position_ids_T=positions,
        cu_seqlens=cu_seqlens,
        num_real_tokens=total,
        stream_positions=moved(prompts.stream_positions, sample[prompts.stream_positions]),
        memories=memories,
        queries=replace(prompts.queries, positions_N=moved(asked, sample[asked])),
    )

"""Logits and drawn tokens of a replica, whole on all of its ranks, over the device's groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_mm import platform
from megatron_mm.data.batch import Microbatch
from megatron_mm.model.layers.output import Predictions
from megatron_mm.parallel.groups import Groups

Drawn = tuple[torch.Tensor, torch.Tensor]  # tokens, int64 [N], and their log-probabilities, fp32


def whole_logits(
    predictions: Predictions,
    batch: Microbatch,
    positions: torch.Tensor,
    wanted: Callable[[Microbatch], torch.Tensor],
    groups: Groups,
    vocab_size: int,
) -> torch.Tensor:
    """Gathers logits, fp32 [wanted positions, V], on every tensor- and context-parallel rank.

    Args:
        predictions: at `positions`, the wanted ones that this context-parallel rank holds.
        wanted: batch -> all wanted positions.
    """
    cp, logits = groups.pg.cp, _whole_vocabulary(predictions, groups, vocab_size)
    if cp.size() > 1:
        everywhere = wanted(batch)
        whole = logits.new_zeros(len(everywhere), logits.shape[1])
        whole[torch.isin(everywhere, positions)] = logits[torch.isin(positions, everywhere)]
        dist.all_reduce(whole, group=cp)
        logits = whole
    return logits


def row_logits(
    predictions: Predictions, batch: Microbatch, positions: None, groups: Groups, vocab_size: int
) -> torch.Tensor:
    """Gathers a step's logits, fp32 [R, V], on every tensor- and context-parallel rank.

    Args:
        predictions: for this rank's part of the rows.
        batch, positions: not needed.
    """
    del batch, positions
    logits = _whole_vocabulary(predictions, groups, vocab_size)
    return logits if groups.pg.cp.size() == 1 else torch.cat(_gathered(logits, groups.pg.cp))


def _whole_vocabulary(predictions: Predictions, groups: Groups, vocab_size: int) -> torch.Tensor:
    tp, logits = groups.pg.tp, predictions.logits().float()
    if tp.size() == 1:
        return logits
    return torch.cat(_gathered(logits, tp), 1)[:, :vocab_size]  # without padding


def _gathered(x: torch.Tensor, group: ProcessGroup) -> list[torch.Tensor]:
    x = x.contiguous()  # a part without its padding is not, and NCCL wants it
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x, group=group)
    return parts


def share(drawn: Sequence[Drawn], counts: Sequence[int], groups: Groups) -> list[Drawn]:
    """Returns what the last stage's first rank drew for each lane, on every rank of the replica.

    Args:
        drawn: on the last stage; elsewhere it is ignored.
        counts: rows of each lane.
    """
    pg = groups.pg
    if groups.replica.size() == 1:
        return list(drawn)
    # fp64 holds any token id exactly.
    both = torch.empty(2, sum(counts), dtype=torch.float64, device=platform.device())
    if groups.is_last_stage:
        for to, parts in zip(both, zip(*drawn, strict=True), strict=True):
            to.copy_(torch.cat(parts))
        # Ranks of other parts have the same logits, but a GPU's sums may differ from one another's.
        if pg.tp_cp.size() > 1:
            dist.broadcast(both, group=pg.tp_cp, group_src=0)
    if pg.pp.size() > 1:
        dist.broadcast(both, group=pg.pp, group_src=pg.pp.size() - 1)
    tokens, logprobs = both[0].long().split(list(counts)), both[1].float().split(list(counts))
    return list(zip(tokens, logprobs, strict=True))


def on_the_host(drawn: Sequence[Sequence[Drawn]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the tokens, int64 [rows of all lanes, n], and their log-probabilities, fp32, of n
    steps on the CPU, in one transfer; the host waits for it."""
    both = torch.stack(
        [
            torch.stack([torch.cat([part[which] for part in lanes]) for lanes in drawn], 1).double()
            for which in (0, 1)
        ]
    ).cpu()
    return both[0].long(), both[1].float()

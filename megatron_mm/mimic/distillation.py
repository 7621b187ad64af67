"""Distillation of next tokens: the divergence of the student's distribution from a teacher's, of
which the n likeliest tokens are known and the mass of all others together.

With teacher's probabilities p_i of the known tokens K, p_o = 1 - sum p_i, and the student's s,

    d = sum_{i in K} p_i log(p_i / s_i) + p_o log(p_o / s_o)        s_o = sum_{v not in K} s_v

    d d / dz_v = s_v - p_v                      v in K
                 s_v (1 - p_o / s_o)            elsewhere

It is the divergence between both distributions with all other tokens taken as one, so never more
than the whole divergence, and 0 only where the known tokens agree. With all tokens known it is the
whole divergence. A teacher in the place of the weights would give that, too, but only a model of
the student's own sizes can stand there (`checkpoint/weight_sets.py`), and on-policy distillation
asks it for one number a token, that of the token drawn (`rl/logprobs.py`).

Logits exist for a block of the vocabulary at a time, as in `model/layers/cross_entropy.py`.

Shapes: K positions, n known tokens, H hidden, V this tensor-parallel rank's slice of the
vocabulary, v a block of it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_mm.model.layers.cross_entropy import Softmax, blocks
from megatron_mm.model.layers.output import Predictions

LEAST_REST = 1e-6  # below it the rest is rounding of the sum of the others


def divergences(
    predictions: Predictions, tokens_Kn: torch.Tensor, logprobs_Kn: torch.Tensor
) -> torch.Tensor:
    """Returns [K], fp32 at least, differentiable once, the same on all tensor-parallel ranks: d at
    each position.

    Args:
        tokens_Kn: int64, different ones of the whole vocabulary.
        logprobs_Kn: the teacher's.
    """
    softmax = Softmax(1.0, predictions.held, predictions.tp)
    return _Divergences.apply(
        predictions.hidden_KH, predictions.weight_VH, tokens_Kn, logprobs_Kn, softmax
    )


class _Divergences(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_KH, weight_VH, tokens_Kn, logprobs_Kn, softmax: Softmax):
        size, parts = len(weight_VH), blocks(len(hidden_KH), len(weight_VH))
        tops, masses, rests = [], [], []
        chosen_Kn: torch.Tensor | None = None
        for part in parts:
            logits_Kv = softmax.logits(hidden_KH, weight_VH, part)
            column_Kn, here_Kn = _columns(softmax, tokens_Kn, size, part)
            found_Kn = torch.where(here_Kn, logits_Kv.gather(1, column_Kn), 0.0)
            chosen_Kn = found_Kn if chosen_Kn is None else chosen_Kn + found_Kn
            tops.append(logits_Kv.amax(1))
            mass_Kv = (logits_Kv - tops[-1].unsqueeze(1)).exp_()
            masses.append(mass_Kv.sum(1))
            # Less the known ones: their difference would be rounding where they are nearly all.
            known_Kv = _known(column_Kn, here_Kn, len(part))
            rests.append(mass_Kv.masked_fill_(known_Kv, 0.0).sum(1))
        assert chosen_Kn is not None  # a vocabulary has tokens
        top_BK = torch.stack(tops)
        top_K = softmax.over_ranks(top_BK.amax(0), dist.ReduceOp.MAX)
        scale_BK = (top_BK - top_K).exp()
        mass_K, rest_K = ((torch.stack(x) * scale_BK).sum(0) for x in (masses, rests))
        sums = torch.cat((mass_K[:, None], rest_K[:, None], chosen_Kn), 1)
        sums = softmax.over_ranks(sums, dist.ReduceOp.SUM)
        mass_K, rest_K, chosen_Kn = sums[:, 0], sums[:, 1], sums[:, 2:]
        rest_K = rest_K.clamp(min=torch.finfo(rest_K.dtype).tiny)
        log_mass_K1 = (top_K + mass_K.log()).unsqueeze(1)
        p_Kn = logprobs_Kn.exp().to(mass_K.dtype)
        other_K = 1.0 - p_Kn.sum(1)
        other_K = torch.where(other_K > LEAST_REST, other_K, 0.0)
        known_K = (p_Kn * (logprobs_Kn - chosen_Kn + log_mass_K1)).sum(1)
        log_rest_K = rest_K.log() - mass_K.log()
        divergence_K = known_K + torch.xlogy(other_K, other_K) - other_K * log_rest_K
        ctx.save_for_backward(hidden_KH, weight_VH, tokens_Kn, p_Kn, other_K, top_K, mass_K, rest_K)
        ctx.softmax = softmax
        return divergence_K

    @staticmethod
    @once_differentiable
    def backward(ctx, d_K):
        hidden_KH, weight_VH, tokens_Kn, p_Kn, other_K, top_K, mass_K, rest_K = ctx.saved_tensors
        softmax, size = ctx.softmax, len(weight_VH)
        d_hidden_KH = torch.zeros_like(hidden_KH, dtype=mass_K.dtype)
        d_weight_VH = torch.empty_like(weight_VH)
        total_K1 = (p_Kn.sum(1) + other_K).unsqueeze(1)
        elsewhere_K1 = (other_K * mass_K / rest_K).unsqueeze(1)  # p_o / s_o
        for part in blocks(len(hidden_KH), size):
            logits_Kv = softmax.logits(hidden_KH, weight_VH, part)
            s_Kv = (logits_Kv - top_K.unsqueeze(1)).exp_().div_(mass_K.unsqueeze(1))
            column_Kn, here_Kn = _columns(softmax, tokens_Kn, size, part)
            known_Kv = _known(column_Kn, here_Kn, len(part))
            # The total is 1 but for rounding, as which it counts here and in the forward pass.
            d_logits_Kv = s_Kv * torch.where(known_Kv, total_K1, total_K1 - elsewhere_K1)
            d_logits_Kv.scatter_add_(1, column_Kn, -p_Kn * here_Kn)
            d_logits_Kv = d_logits_Kv.mul_(d_K.unsqueeze(1)).to(weight_VH.dtype)
            rows = slice(part.start, part.stop)
            d_hidden_KH += torch.mm(d_logits_Kv, weight_VH[rows])
            torch.mm(d_logits_Kv.t(), hidden_KH, out=d_weight_VH[rows])
        return d_hidden_KH.to(hidden_KH.dtype), d_weight_VH, None, None, None


def _columns(
    softmax: Softmax, tokens_Kn: torch.Tensor, size: int, at: range
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the columns of tokens in a block of this rank's slice of `size`, int64 [K, n], and
    whether they are in it. The column of a token elsewhere is any of the block."""
    column_Kn = tokens_Kn - (softmax.tp.rank() * size + at.start)
    here_Kn = (column_Kn >= 0) & (column_Kn < len(at))
    return column_Kn.clamp(0, len(at) - 1), here_Kn


def _known(column_Kn: torch.Tensor, here_Kn: torch.Tensor, width: int) -> torch.Tensor:
    """Returns bool [K, v]: whether a column is that of a known token."""
    marked = column_Kn.new_zeros(len(column_Kn), width + 1, dtype=torch.bool)
    beyond_Kn = torch.where(here_Kn, column_Kn, width)
    return marked.scatter_(1, beyond_Kn, True)[:, :width]

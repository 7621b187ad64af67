"""Fused linear cross entropy: log-probabilities and entropies from hidden states, without logits.

With hidden states h and the output layer's weight W, of a row of logits z = h W^T / temperature:

    log p(y) = z_y - log Z                  Z = sum_j exp z_j
    entropy  = log Z - sum_j p_j z_j        p_j = exp z_j / Z

    d log p(y) / dz_j = [j = y] - p_j       d entropy / dz_j = -p_j (log p_j + entropy)

Logits exist for a block of the vocabulary at a time. The forward pass keeps h and two numbers a
row, the backward pass computes each block again (Wijmans et al. 2024, "Cut Your Losses in
Large-Vocabulary Language Models", arXiv 2411.09009, section 4). A block is all positions
at some tokens, not some positions at all tokens (as in Liger's kernels, arXiv 2410.10989): so each
row of W's gradient is the result of one product over all positions, as without blocks, and nothing
of W's size is summed up. Only the gradient of h is a sum over blocks.

Shapes: K positions, H hidden, V this tensor-parallel rank's slice of the vocabulary, v a block of
it, B blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

# Bytes of a block of logits in fp32. A pass holds up to three times as much at once. At 8,192
# positions a block is 4,096 tokens wide, enough for a GPU's products to run at full speed.
BLOCK_BYTES = 2**27
# The width of a block is a multiple of this, so that products and their gradients are aligned.
WIDTH_MULTIPLE = 128
# The logit of padding. Its exponential is exactly 0 in every precision. Finite, because an entropy
# multiplies the two, and 0 times infinity is not a number.
PADDED_LOGIT = -1e30


@dataclass(frozen=True)
class Softmax:
    """How rows of hidden states become distributions over the vocabulary.

    Attributes:
        temperature: divisor of the logits.
        held: tokens of this rank's slice of the vocabulary; the rows of the weight after them are
            padding, whose probability is 0.
        tp: the ranks that share the vocabulary.
    """

    temperature: float
    held: int
    tp: ProcessGroup

    def logits(self, hidden_KH: torch.Tensor, weight_VH: torch.Tensor, at: range) -> torch.Tensor:
        """Returns [K, v], fp32 at least: the logits of a block of this rank's slice."""
        logits_Kv = torch.matmul(hidden_KH, weight_VH[at.start : at.stop].t())
        logits_Kv = logits_Kv.to(_wide(logits_Kv))
        if self.temperature != 1.0:
            logits_Kv /= self.temperature
        if self.held < at.stop:
            logits_Kv[:, max(self.held - at.start, 0) :] = PADDED_LOGIT
        return logits_Kv

    def place(self, labels_K: torch.Tensor, size: int, at: range) -> tuple[torch.Tensor, ...]:
        """Returns the column of each label in a block of a slice of `size`, int64 [K, 1], and
        whether it is in it, bool [K]. The column of a label elsewhere is any of the block."""
        column_K = labels_K - (self.tp.rank() * size + at.start)
        here_K = (column_K >= 0) & (column_K < len(at))
        return column_K.clamp(0, len(at) - 1).unsqueeze(1), here_K

    def over_ranks(self, values: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        """Reduces in place over the ranks that share the vocabulary."""
        if self.tp.size() > 1:
            dist.all_reduce(values, op=op, group=self.tp)
        return values


def blocks(positions: int, size: int) -> list[range]:
    """Cuts a slice of the vocabulary of `size` tokens into blocks for this many positions."""
    width = BLOCK_BYTES // (4 * max(positions, 1)) // WIDTH_MULTIPLE * WIDTH_MULTIPLE
    width = max(width, WIDTH_MULTIPLE)
    return [range(first, min(first + width, size)) for first in range(0, size, width)]


def linear_logprobs(
    hidden_KH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_K: torch.Tensor,
    softmax: Softmax,
    *,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the log-probability of each row's label and, if asked, each row's entropy in nats:
    fp32 [K] each (fp64 for fp64), differentiable once, the same on all ranks of `softmax.tp`.

    Args:
        hidden_KH: the same on all of these ranks. Its gradient is this rank's part of a sum over
            them, which the caller takes.
        weight_VH: this rank's slice of the output layer's weight.
        labels_K: int64, tokens of the whole vocabulary.
    """
    return _LinearLogprobs.apply(hidden_KH, weight_VH, labels_K, softmax, entropy)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_KH, weight_VH, labels_K, softmax: Softmax, entropy: bool):
        size, parts = len(weight_VH), blocks(len(hidden_KH), len(weight_VH))
        tops, masses, moments = [], [], []
        chosen_K = hidden_KH.new_zeros(len(hidden_KH), dtype=_wide(hidden_KH))
        logits_Kv = None
        for part in parts:
            logits_Kv = softmax.logits(hidden_KH, weight_VH, part)
            column_K1, here_K = softmax.place(labels_K, size, part)
            chosen_K += torch.where(here_K, logits_Kv.gather(1, column_K1).squeeze(1), 0.0)
            top_K, mass_K, moment_K = _sums(logits_Kv, entropy)
            tops.append(top_K)
            masses.append(mass_K)
            moments.append(moment_K)
        top_K, mass_K, chosen_K, moment_K = _over_all(softmax, tops, masses, chosen_K, moments)
        log_mass_K = mass_K.log()
        entropy_K = log_mass_K - moment_K / mass_K if entropy else None
        # A single block is small enough to be kept, which saves its product.
        kept = logits_Kv if len(parts) == 1 and any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden_KH, weight_VH, labels_K, top_K, mass_K, entropy_K, kept)
        ctx.softmax = softmax
        ctx.set_materialize_grads(False)
        return chosen_K - top_K - log_mass_K, entropy_K

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprob_K, d_entropy_K):
        hidden_KH, weight_VH, labels_K, top_K, mass_K, entropy_K, kept = ctx.saved_tensors
        softmax, (wants_hidden, wants_weight, *_) = ctx.softmax, ctx.needs_input_grad
        if d_logprob_K is None and d_entropy_K is None:
            return None, None, None, None, None
        size = len(weight_VH)
        d_hidden_KH = torch.zeros_like(hidden_KH, dtype=_wide(hidden_KH)) if wants_hidden else None
        d_weight_VH = torch.empty_like(weight_VH) if wants_weight else None
        for part in blocks(len(hidden_KH), size):
            if kept is None:
                shifted_Kv = softmax.logits(hidden_KH, weight_VH, part).sub_(top_K.unsqueeze(1))
            else:
                shifted_Kv = kept - top_K.unsqueeze(1)
            at = softmax.place(labels_K, size, part)
            d_logits_Kv = _d_logits(shifted_Kv, mass_K, entropy_K, at, d_logprob_K, d_entropy_K)
            del shifted_Kv
            if softmax.temperature != 1.0:
                d_logits_Kv /= softmax.temperature
            d_logits_Kv = d_logits_Kv.to(weight_VH.dtype)
            rows = slice(part.start, part.stop)
            if d_hidden_KH is not None:
                d_hidden_KH += torch.mm(d_logits_Kv, weight_VH[rows])
            if d_weight_VH is not None:
                torch.mm(d_logits_Kv.t(), hidden_KH, out=d_weight_VH[rows])
        if d_hidden_KH is not None:
            d_hidden_KH = d_hidden_KH.to(hidden_KH.dtype)
        return d_hidden_KH, d_weight_VH, None, None, None


def _sums(logits_Kv: torch.Tensor, entropy: bool) -> tuple[torch.Tensor, ...]:
    """Returns of each row of a block the highest logit, the sum of exponentials of the logits less
    it, and the sum of these logits weighted by their exponentials (0 unless `entropy`)."""
    top_K = logits_Kv.amax(1)
    shifted_Kv = logits_Kv - top_K.unsqueeze(1)
    if not entropy:
        return top_K, shifted_Kv.exp_().sum(1), torch.zeros_like(top_K)
    mass_Kv = shifted_Kv.exp()
    return top_K, mass_Kv.sum(1), shifted_Kv.mul_(mass_Kv).sum(1)


def _over_all(
    softmax: Softmax,
    tops: Sequence[torch.Tensor],
    masses: Sequence[torch.Tensor],
    chosen_K: torch.Tensor,
    moments: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """Returns what `_sums` returns of the whole vocabulary, with the labels' logits before its last
    number. Relative to another top t', the sums m and n of a block of top t are m e^(t - t') and
    (n + (t - t') m) e^(t - t')."""
    top_BK, mass_BK, moment_BK = torch.stack(tops), torch.stack(masses), torch.stack(moments)
    top_K = softmax.over_ranks(top_BK.amax(0), dist.ReduceOp.MAX)
    shift_BK = top_BK - top_K
    scale_BK = shift_BK.exp()
    mass_K = (mass_BK * scale_BK).sum(0)
    moment_K = ((moment_BK + shift_BK * mass_BK) * scale_BK).sum(0)
    sums_3K = torch.stack((mass_K, chosen_K, moment_K))
    return top_K, *softmax.over_ranks(sums_3K, dist.ReduceOp.SUM).unbind()


def _d_logits(
    shifted_Kv: torch.Tensor,
    mass_K: torch.Tensor,
    entropy_K: torch.Tensor | None,
    at: tuple[torch.Tensor, ...],
    d_logprob_K: torch.Tensor | None,
    d_entropy_K: torch.Tensor | None,
) -> torch.Tensor:
    """Returns the gradient of a block of logits, over the temperature; overwrites `shifted_Kv`."""
    p_Kv = shifted_Kv.exp().div_(mass_K.unsqueeze(1))
    d_logits_Kv = None
    if d_entropy_K is not None:
        assert entropy_K is not None  # it has a gradient
        d_logits_Kv = shifted_Kv.sub_((mass_K.log() - entropy_K).unsqueeze(1)).mul_(p_Kv)
        d_logits_Kv.mul_(-d_entropy_K.unsqueeze(1))
    if d_logprob_K is not None:
        column_K1, here_K = at
        p_Kv.scatter_(1, column_K1, p_Kv.gather(1, column_K1) - here_K.unsqueeze(1).to(p_Kv.dtype))
        p_Kv.mul_(-d_logprob_K.unsqueeze(1))
        d_logits_Kv = p_Kv if d_logits_Kv is None else d_logits_Kv.add_(p_Kv)
    assert d_logits_Kv is not None  # one of the two has a gradient
    return d_logits_Kv


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)

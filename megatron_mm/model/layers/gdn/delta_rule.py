"""The gated delta rule in plain torch, chunked (Yang et al. 2024, "Gated Delta Networks",
arXiv 2412.06464, section 3.3 and the UT transform of DeltaNet, arXiv 2406.06484).

Per head, with decay a_t = exp(g_t), write strength b_t, key k_t, value v_t, query q_t:

    S_t = a_t S_{t-1} + b_t k_t (v_t - a_t S_{t-1}^T k_t)^T        o_t = S_t^T q_t

Within a chunk whose first state is S, with G the running sum of g, D_ij = exp(G_i - G_j):

    U = T (b V - b e^G K S)          T = (I + A)^-1, A = strictly lower part of b (K K^T) D
    O = e^G Q S + P U                P = lower part of (Q K^T) D
    S' = e^{G_C} S + (e^{G_C - G} K)^T U

The work inside chunks is batched over all of them; only U and S' go from chunk to chunk. The
backward pass is written out by hand: autograd would keep a dozen [C, C] and [C, K] tensors a
chunk and pass over each of them several times.

Shapes: T positions of the stream, B chunks (chunks.py), C positions of a chunk, k key heads,
r value heads per key head, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from megatron_mm.model.layers.gdn.chunks import (
    ChunkPlan,
    chunk_length,
    chunk_plan,
    to_cells,
    to_stream,
)
from megatron_mm.model.running_sum import running_sum

EPS = 1e-6  # of the l2 norms, as in FLA and transformers


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
) -> torch.Tensor:
    """Reads out every position from a zero state, for rows of one length.

    Args:
        query, key: [rows, L, k, K], not yet normalised.
        value: [rows, L, k * r, V]; each key head serves r neighbouring value heads.
        log_decay, beta: [rows, L, k * r]; log_decay <= 0, beta in (0, 1).
    Returns:
        [rows, L, k * r, V] in the dtype of value; computed in fp32.
    """
    rows, length = key.shape[:2]
    q, k, v, g, b = (x.flatten(0, 1) for x in (query, key, value, log_decay, beta))
    out = stream_delta_rule(q, k, v, g, b, lengths=(length,) * rows)
    return out.view(rows, length, *value.shape[2:])


def stream_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    lengths: Sequence[int],
) -> torch.Tensor:
    """The same for samples of any `lengths` laid end to end: every argument and the result
    without the rows, [T, ...]. Each sample starts from a zero state."""
    cells, plan = _cells(query, key, value, log_decay, beta, lengths)
    return _stream(_DeltaRule.apply(*cells, plan), plan).to(value.dtype)


def delta_rule_and_state(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    lengths: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`stream_delta_rule` without gradients, and the state after each sample, fp32
    [samples, k, r, K, V]."""
    (q, k, v, g, b), plan = _cells(query, key, value, log_decay, beta, lengths)
    with torch.no_grad():
        out, kept = _forward(q, k, v, g, b, plan)
        state = _final_states(kept, plan, lengths)
    return _stream(out, plan).to(value.dtype), state


def _cells(query, key, value, log_decay, beta, lengths) -> tuple[list[torch.Tensor], ChunkPlan]:
    """The arguments of `_forward` but the plan, and the plan."""
    heads, values = key.shape[1], value.shape[1] // key.shape[1]
    size = chunk_length(max(lengths), key.shape[-1], value.shape[-1])
    plan = chunk_plan(tuple(lengths), size, value.device)
    q, k, v, g, b = (
        to_cells(x.float(), plan) for x in (query, key, value, log_decay, beta)
    )  # [B, C, heads, ...]
    cells = [
        q.transpose(1, 2).contiguous(),
        k.transpose(1, 2).contiguous(),
        v.unflatten(2, (heads, values)).permute(0, 2, 3, 1, 4).contiguous(),
        g.unflatten(2, (heads, values)).permute(0, 2, 3, 1).contiguous(),
        b.unflatten(2, (heads, values)).permute(0, 2, 3, 1).contiguous(),
    ]
    return cells, plan


def _stream(out: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
    """[B, k, r, C, V] -> [T, k * r, V]"""
    return to_stream(out.permute(0, 3, 1, 2, 4).flatten(2, 3), plan)


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b over the last two dimensions; the leading ones are equal."""
    return torch.bmm(a.flatten(0, -3), b.flatten(0, -3)).view(*a.shape[:-1], b.shape[-1])


def _inverse(system: torch.Tensor) -> torch.Tensor:
    """(I + A)^-1; only what is below A's diagonal is read. Products with it are much faster than
    a triangular solve for each of the three right sides."""
    eye = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
    return torch.linalg.solve_triangular(
        system, eye.expand_as(system), upper=False, unitriangular=True
    )


class _Kept(NamedTuple):
    """Intermediates of the forward pass for the backward pass, or for the states at the end."""

    query: torch.Tensor
    key: torch.Tensor
    q_scale: torch.Tensor
    k_scale: torch.Tensor
    value: torch.Tensor
    beta: torch.Tensor
    total: torch.Tensor  # running sum of the log decay in each chunk
    decay: torch.Tensor
    linked: torch.Tensor
    inverse: torch.Tensor
    new: torch.Tensor  # U
    reads: torch.Tensor | None
    states: torch.Tensor | None  # at the start of each chunk after the first step


def _forward(query, key, value, log_decay, beta, plan: ChunkPlan) -> tuple[torch.Tensor, _Kept]:
    """query, key [B, k, C, K]; value [B, k, r, C, V]; log_decay, beta [B, k, r, C];
    out [B, k, r, C, V]. Chunks are ordered as `ChunkPlan` says: step by step."""
    q_scale = inverse_norm(query).mul_(query.shape[-1] ** -0.5)
    k_scale = inverse_norm(key)
    q, k = query * q_scale, key * k_scale
    total = running_sum(log_decay)
    # Above the diagonal D is 0 (exp would overflow there), on it 1.
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).clamp_(max=0.0).exp_().tril_()
    k_t = k.transpose(-1, -2)
    linked = decay * _bmm(k, k_t).unsqueeze(2)  # A without beta, and with a diagonal
    scores = decay * _bmm(q, k_t).unsqueeze(2)
    inverse = _inverse(linked * beta.unsqueeze(-1))
    new = _bmm(inverse, value * beta.unsqueeze(-1))
    first, reads, states = plan.active[0], None, None
    if len(plan.active) > 1:
        since = total[first:].exp().unsqueeze(-1)
        strength = beta[first:].unsqueeze(-1) * since
        reads = _bmm(inverse[first:], strength * k[first:].unsqueeze(2))
        states = _scan(new, reads, k, total, plan)  # completes `new`
    out = _bmm(scores, new)
    if states is not None:
        out[first:] += _bmm(q[first:].unsqueeze(2) * since, states)
    kept = _Kept(
        query,
        key,
        q_scale,
        k_scale,
        value,
        beta,
        total,
        decay,
        linked,
        inverse,
        new,
        reads,
        states,
    )
    return out, kept


class _DeltaRule(torch.autograd.Function):
    """`_forward`, with its backward pass."""

    @staticmethod
    def forward(ctx, query, key, value, log_decay, beta, plan: ChunkPlan):
        out, kept = _forward(query, key, value, log_decay, beta, plan)
        ctx.plan = plan
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        (
            query,
            key,
            q_scale,
            k_scale,
            value,
            beta,
            total,
            decay,
            linked,
            inverse,
            new,
            reads,
            states,
        ) = ctx.saved_tensors
        plan, first = ctx.plan, ctx.plan.active[0]
        q, k, strength = query * q_scale, key * k_scale, beta.unsqueeze(-1)
        d_out = d_out.contiguous()
        scores = decay * _bmm(q, k.transpose(-1, -2)).unsqueeze(2)
        d_scores = _bmm(d_out, new.transpose(-1, -2))
        d_new = _bmm(scores.transpose(-1, -2), d_out)
        d_q, d_k = torch.zeros_like(q), torch.zeros_like(k)
        # of G by what leaves the chunk's start, and of G_C - G by what stays until its end
        d_total, d_until = torch.zeros_like(total), torch.zeros_like(total)
        if states is not None:
            _scan_backward(
                q, k, total, d_out, new, reads, states, d_new, d_k, d_total, d_until, plan
            )  # completes d_new
        d_right = _bmm(inverse.transpose(-1, -2), d_new)
        # d_right U^T is minus the gradient of A, which is linked * beta below the diagonal.
        d_linked = _bmm(d_right, new.transpose(-1, -2)).neg_()
        scores.mul_(d_scores)
        linked = linked * d_linked
        d_beta = (d_right * value).sum(-1) + linked.tril(-1).sum(-1)
        # The decay from j to i holds the decays of the steps t in j < t <= i: add up exactly
        # those pairs. Through G, whose gradient is row sums less column sums, everything
        # else would have to cancel, the diagonal included; A_log's gradient shows it.
        moved = scores.addcmul_(linked, strength).tril_(-1)
        before = running_sum(moved).tril_(-1).sum(-2)  # at t - 1 for step t
        d_scores.mul_(decay)
        d_linked.mul_(decay).mul_(strength).tril_(-1)
        d_scores, d_linked = d_scores.sum(2), d_linked.sum(2)
        d_q += _bmm(d_scores, k)
        d_k += _bmm(d_scores.transpose(-1, -2), q)
        d_k += _bmm(d_linked + d_linked.transpose(-1, -2), k)
        if states is not None:
            since, kept = total[first:].exp().unsqueeze(-1), states.transpose(-1, -2)
            read = _bmm(d_out[first:], kept).mul_(since)  # d of (Q S), by Q
            d_q[first:] += read.sum(2)
            d_total[first:] += (read * q[first:].unsqueeze(2)).sum(-1)
            read = _bmm(d_right[first:], kept).mul_(since)  # d of (-K S), by K
            against = (read * k[first:].unsqueeze(2)).sum(-1)
            d_k[first:] -= read.mul_(strength[first:]).sum(2)
            d_beta[first:] -= against
            d_total[first:] -= against * beta[first:]
        d_value = d_right * strength
        d_log_decay = running_sum(d_total.flip(-1)).flip(-1)
        d_log_decay[..., 1:] += (before + running_sum(d_until))[..., :-1]
        d_query = _norm_backward(d_q, query, q_scale, query.shape[-1])
        d_key = _norm_backward(d_k, key, k_scale, 1)
        return d_query, d_key, d_value, d_log_decay, d_beta, None


def _final_states(kept: _Kept, plan: ChunkPlan, lengths: Sequence[int]) -> torch.Tensor:
    """[samples, k, r, K, V]: S' of each sample's last chunk, its padding left out."""
    ends = torch.tensor(lengths, device=kept.new.device).cumsum(0) - 1
    cell = plan.position_index[ends]
    chunk, last = cell // plan.size, cell % plan.size
    total = kept.total[chunk]
    until = total.gather(-1, last.view(-1, 1, 1, 1).expand(*total.shape[:3], 1))
    padding = torch.arange(plan.size, device=last.device) > last[:, None]
    weight = (until - total).masked_fill(padding[:, None, None], -torch.inf).exp()
    keys = (kept.key * kept.k_scale)[chunk].unsqueeze(2) * weight.unsqueeze(-1)
    state = _bmm(keys.transpose(-1, -2), kept.new[chunk])
    if kept.states is not None:
        (later,) = (chunk >= plan.active[0]).nonzero(as_tuple=True)
        before = kept.states[chunk[later] - plan.active[0]]
        state[later] += before * until[later].exp().unsqueeze(-1)
    return state


def inverse_norm(x: torch.Tensor) -> torch.Tensor:
    """1 / sqrt(sum(x^2) + eps) over the last dimension, which stays."""
    return x.square().sum(-1, keepdim=True).add_(EPS).rsqrt_()


def _norm_backward(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, width: int
) -> torch.Tensor:
    """Through y = x scale, scale = 1 / sqrt(width (sum(x^2) + eps))."""
    along = (grad * x).sum(-1, keepdim=True).mul_(scale.square()).mul_(width)
    return grad.addcmul_(x, along, value=-1.0).mul_(scale)


def _scan(new, reads, k, total, plan: ChunkPlan) -> torch.Tensor:
    """The states [chunks after the first step, k, r, K, V] at the start of each chunk; what
    they predict is taken from `new`, in place. `reads` has no rows of the first step."""
    first, steps = plan.active[0], plan.steps
    groups, value_width = new.shape[1:3], new.shape[-1]
    states = new.new_empty(len(reads), *groups, k.shape[-1], value_width)
    for step, count in zip(steps[:-1], plan.active[1:], strict=True):
        rows = slice(step.start, step.start + count)  # the chunks that have a successor
        last = total[rows, ..., -1:]
        keys = k[rows].unsqueeze(2) * (last - total[rows]).exp_().unsqueeze(-1)
        after = slice(step.stop - first, step.stop - first + count)
        state = _bmm(keys.transpose(-1, -2), new[rows])
        if step.start:
            before = slice(step.start - first, step.start - first + count)
            state.addcmul_(states[before], last.exp().unsqueeze(-1))
        states[after] = state
        new[step.stop : step.stop + count] -= _bmm(reads[after], state)
    return states


def _scan_backward(
    q, k, total, d_out, new, reads, states, d_new, d_k, d_total, d_until, plan
) -> None:
    """Adds to d_new, d_k, d_total, d_until what comes through the states, last step first."""
    first, steps = plan.active[0], plan.steps
    d_after = None  # of the states at the step after
    for index in reversed(range(len(steps))):
        step = steps[index]
        here = slice(step.start - first, step.stop - first)
        count = 0 if d_after is None else len(d_after)
        rows = slice(step.start, step.start + count)
        last = total[rows, ..., -1:]
        if d_after is not None and count:
            until = (last - total[rows]).exp_().unsqueeze(-1)
            keys = k[rows].unsqueeze(2)
            d_new[rows] += _bmm(keys * until, d_after)
            written = _bmm(new[rows], d_after.transpose(-1, -2)).mul_(until)
            d_k[rows] += written.sum(2)
            d_until[rows] = (written * keys).sum(-1)
        if not index:
            return
        d_state = _bmm(
            (q[step].unsqueeze(2) * total[step].exp().unsqueeze(-1)).transpose(-1, -2), d_out[step]
        )
        d_state -= _bmm(reads[here].transpose(-1, -2), d_new[step])
        if count:
            carried = d_after * last.exp().unsqueeze(-1)
            d_state[:count] += carried
            d_total[rows, ..., -1] += (states[here][:count] * carried).sum((-1, -2))
        d_after = d_state

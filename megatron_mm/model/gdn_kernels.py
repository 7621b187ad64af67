"""The gated delta rule in plain torch, chunked (Yang et al. 2024, "Gated Delta Networks",
arXiv 2412.06464, section 3.3 and the UT transform of DeltaNet, arXiv 2406.06484).

Per head, with decay a_t = exp(g_t), write strength b_t, key k_t, value v_t, query q_t:

    S_t = a_t S_{t-1} + b_t k_t (v_t - a_t S_{t-1}^T k_t)^T        o_t = S_t^T q_t

Shapes: N rows (samples), L positions, h heads, K key width, V value width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

CHUNK = 64


def l2_normalise(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dimension, as FLA and transformers do."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def chunk_length(length: int) -> int:
    """Short rows are one chunk of their own length: no padding, no recurrence over chunks."""
    return min(length, CHUNK)


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
) -> torch.Tensor:
    """Every position's read-out, from a zero state.

    Args:
        query, key: [N, L, h, K], not yet normalised.
        value: [N, L, h, V].
        log_decay, beta: [N, L, h]; log_decay <= 0, beta in (0, 1).
    Returns:
        [N, L, h, V] in the dtype of value; computed in fp32.
    """
    rows, length, heads, key_width = key.shape
    size = chunk_length(length)
    chunks = -(-length // size)

    def chunked(x: torch.Tensor) -> torch.Tensor:
        """[N, L, h, ...] -> [N, h, chunks, size, ...], zero padded on the right, in fp32."""
        x = x.float()
        if chunks * size != length:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, chunks * size - length))
        return x.transpose(1, 2).reshape(rows, heads, chunks, size, *x.shape[3:])

    q = chunked(l2_normalise(query.float()) * key_width**-0.5)
    k = chunked(l2_normalise(key.float()))
    v, g, b = chunked(value), chunked(log_decay), chunked(beta)

    total = g.cumsum(-1)  # log of the decay since the chunk began
    # Decay from j to i. Above the diagonal it is 0 (exp would overflow there). On it, it is 1 by
    # definition: left to autograd, its gradient, the largest of all, would only cancel in
    # the sums over total, and leave A_log's gradient at 1e-4 instead of 1e-6.
    earlier = torch.ones(size, size, dtype=torch.bool, device=g.device).tril(-1)
    fixed = torch.full((size, size), -torch.inf, device=g.device).triu(1)
    decay = torch.where(earlier, total.unsqueeze(-1) - total.unsqueeze(-2), fixed).exp()

    k_beta = k * b.unsqueeze(-1)
    k_t = k.transpose(-1, -2)
    # Within a chunk the writes depend on each other: (I + A) U = beta V. solve_triangular
    # with unitriangular=True reads only below the diagonal of A.
    system = (k_beta @ k_t) * decay
    scores = (q @ k_t) * decay
    writes = v * b.unsqueeze(-1)
    if chunks == 1:  # the state before the only chunk is zero
        solved = torch.linalg.solve_triangular(system, writes, upper=False, unitriangular=True)
        out = scores @ solved
    else:
        reads = k_beta * total.exp().unsqueeze(-1)
        solved = torch.linalg.solve_triangular(
            system, torch.cat((writes, reads), -1), upper=False, unitriangular=True
        )
        out = _scan(q, k, solved, scores, total, value.shape[-1])
    out = out.reshape(rows, heads, chunks * size, -1)[:, :, :length]
    return out.transpose(1, 2).to(value.dtype)


def _scan(q, k, solved, scores, total, value_width: int) -> torch.Tensor:
    """Carry the state [N, h, K, V] over the chunks; the arguments are [N, h, chunks, size, ...]."""
    writes, reads = solved.split([value_width, solved.shape[-1] - value_width], dim=-1)
    q_decayed = q * total.exp().unsqueeze(-1)
    k_rest = (k * (total[..., -1:] - total).exp().unsqueeze(-1)).transpose(-1, -2)
    chunk_decay = total[..., -1].exp()[..., None, None]
    state, outs = None, []
    for i in range(q.shape[2]):
        new = writes[:, :, i]
        out = None
        if state is not None:
            new = new - reads[:, :, i] @ state
            out = q_decayed[:, :, i] @ state
        inside = scores[:, :, i] @ new
        outs.append(inside if out is None else out + inside)
        added = k_rest[:, :, i] @ new
        state = added if state is None else state * chunk_decay[:, :, i] + added
    return torch.stack(outs, dim=2)


def causal_conv(x_NLC: torch.Tensor, weight_CW: torch.Tensor) -> torch.Tensor:
    """Depthwise causal convolution over L, then silu, as a sum of W shifted products.

    On the CPU this is several times faster than a grouped conv1d with so short a kernel.
    """
    width = weight_CW.shape[1]
    length = x_NLC.shape[1]
    padded = F.pad(x_NLC, (0, 0, width - 1, 0))
    out = padded[:, width - 1 :] * weight_CW[:, width - 1]
    for i in range(width - 1):
        out = out + padded[:, i : i + length] * weight_CW[:, i]
    return F.silu(out)

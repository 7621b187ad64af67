"""The kernel behind torch's `varlen_attn`, written out for the CPU, where torch has none.

It takes what FlashAttention takes and nothing else, reads what FlashAttention reads, and leaves NaN
in every row that no segment covers, as an uninitialised buffer would hold anything. Like it, it
computes with numbers of 16 bits in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.attention import varlen as torchs


def install() -> None:
    """Gives torch's two operations kernels on the CPU; its own `varlen_attn` and its derivative
    then run."""
    torchs._varlen_attn.register_kernel("cpu")(_forward)
    torchs._varlen_attn_backward.register_kernel("cpu")(_backward)


def _segments(
    query, key, value, bounds_q, bounds_k, most_q: int, most_k: int
) -> Iterator[tuple[slice, slice]]:
    """The rows of queries and keys of each segment, after the checks that CUDA's code makes and
    those that it leaves out."""
    assert query.shape[1] % key.shape[1] == 0 and key.shape == value.shape
    assert all(x.stride(-1) == 1 and x.dtype == query.dtype for x in (query, key, value))
    for bounds, most, stream in ((bounds_q, most_q, query), (bounds_k, most_k, key)):
        assert bounds.dtype == torch.int32 and bounds.is_contiguous()
        assert bounds[0] == 0 and bounds[-1] == len(stream)
        assert int(bounds.diff().min()) >= 0 and int(bounds.diff().max()) <= most
    ends_q, ends_k = bounds_q.tolist(), bounds_k.tolist()
    for n in range(len(ends_q) - 1):
        yield slice(ends_q[n], ends_q[n + 1]), slice(ends_k[n], ends_k[n + 1])


def _scores(query_qhD, key_kgD, causal: bool, scale: float | None) -> torch.Tensor:
    """[h, q, k]; a causal segment is aligned at its end."""
    heads, width = query_qhD.shape[1:]
    key = key_kgD.repeat_interleave(heads // key_kgD.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", query_qhD, key) * (scale or width**-0.5)
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool)
        scores = scores.masked_fill(hidden.triu(1 + len(key) - len(query_qhD)), -torch.inf)
    return scores


def _causal(causal: bool, window: list[int] | None) -> bool:
    assert tuple(window or (-1, -1)) in ((-1, -1), (-1, 0))
    assert causal == (tuple(window or (-1, -1)) == (-1, 0))
    return causal


def _forward(query, key, value, bounds_q, bounds_k, most_q, most_k, causal=False, scale=None,
             window=None):  # fmt: skip
    dtype = query.dtype
    segments = list(_segments(query, key, value, bounds_q, bounds_k, most_q, most_k))
    query, key, value = _wide(query, key, value)
    out = torch.full_like(query, torch.nan)
    sums = query.new_full((query.shape[1], len(query)), torch.nan)
    for q, k in segments:
        scores = _scores(query[q], key[k], _causal(causal, window), scale)
        sums[:, q] = scores.logsumexp(-1)
        shared = value[k].repeat_interleave(query.shape[1] // value.shape[1], 1)
        out[q] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), shared)
    return out.to(dtype), sums, torch.zeros(2, dtype=torch.uint64)


def _backward(d_out, query, key, value, out, sums, bounds_q, bounds_k, most_q, most_k, causal, rng,
              scale=None, window=None):  # fmt: skip
    dtype = query.dtype
    segments = list(_segments(query, key, value, bounds_q, bounds_k, most_q, most_k))
    query, key, value, out, d_out = _wide(query, key, value, out, d_out)
    d_query, d_key, d_value = (torch.full_like(x, torch.nan) for x in (query, key, value))
    times, width = query.shape[1] // key.shape[1], query.shape[2]
    for q, k in segments:
        scores = _scores(query[q], key[k], _causal(causal, window), scale)
        weights = (scores - sums[:, q, None]).exp()
        wide_key, wide_value = (x[k].repeat_interleave(times, 1) for x in (key, value))
        d_weights = torch.einsum("qhd,khd->hqk", d_out[q], wide_value)
        along = (d_out[q] * out[q]).sum(-1).T[..., None]
        d_scores = weights * (d_weights - along) * (scale or width**-0.5)
        d_query[q] = torch.einsum("hqk,khd->qhd", d_scores, wide_key)
        for gradient, of_heads in (
            (d_key, torch.einsum("hqk,qhd->khd", d_scores, query[q])),
            (d_value, torch.einsum("hqk,qhd->khd", weights, d_out[q])),
        ):
            gradient[k] = of_heads.unflatten(1, (-1, times)).sum(2)
    return d_query.to(dtype), d_key.to(dtype), d_value.to(dtype)


def _wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.float() if x.dtype.itemsize == 2 else x for x in tensors]

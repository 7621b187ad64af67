"""The short convolution of a gated DeltaNet over whole samples.

Shapes: T positions of the stream, C channels, W taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megatron_mm import platform
from megatron_mm.model.segments import Segments


def stream_conv(
    x_TC: torch.Tensor, weight_CW: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """Depthwise causal convolution over each sample of the stream, then silu: [T, C].

    A sum of W shifted products: on the CPU several times faster than a grouped conv1d.
    """
    index = padded_index(tuple(lengths), weight_CW.shape[1] - 1, x_TC.device)
    return _Convolution.apply(x_TC, weight_CW, index, len(lengths))


@lru_cache(maxsize=32)
def padded_index(lengths: tuple[int, ...], pad: int, device: torch.device) -> torch.Tensor:
    """int64 [T]: where each position goes when `pad` empty rows stand before every sample."""
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    index = torch.arange(len(sample)) + pad * (sample + 1)
    return platform.moved(index, device)


class _Convolution(torch.autograd.Function):
    """The convolution with a backward pass by hand: autograd keeps and adds up every shifted
    product."""

    @staticmethod
    def forward(ctx, x_TC, weight_CW, index_T, samples: int):
        taps = weight_CW.t().contiguous()  # [W, C]
        pad = len(taps) - 1
        padded = x_TC.new_zeros(len(x_TC) + pad * samples, x_TC.shape[1])
        padded.index_copy_(0, index_T, x_TC)
        rows = len(padded) - pad
        mixed = padded[pad:] * taps[pad]
        for tap in range(pad):
            mixed.addcmul_(padded[tap : tap + rows], taps[tap])
        mixed = mixed.index_select(0, index_T - pad)
        ctx.save_for_backward(padded, taps, index_T, mixed)
        return F.silu(mixed)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        padded, taps, index_T, mixed = ctx.saved_tensors
        pad = len(taps) - 1
        d_mixed = torch.zeros_like(padded)
        d_mixed.index_copy_(0, index_T, torch.ops.aten.silu_backward(d_out, mixed))
        rows = len(padded) - pad
        d_padded = d_mixed * taps[pad]
        d_taps = torch.empty_like(taps)
        for tap in range(pad + 1):
            shifted = d_mixed[pad:]
            torch.sum(padded[tap : tap + rows] * shifted, 0, out=d_taps[tap])
            if tap < pad:
                d_padded[tap : tap + rows].addcmul_(shifted, taps[tap])
        return d_padded.index_select(0, index_T), d_taps.t(), None, None


def last_inputs(x_TC: torch.Tensor, taps: int, segments: Segments) -> torch.Tensor:
    """The inputs that the convolution of each sample needs to continue, [samples, W - 1, C]; zero
    before a sample's beginning."""
    back = torch.arange(taps - 1, 0, -1)
    place = (segments.starts + segments.lengths)[:, None] - back
    real = (place >= segments.starts[:, None]).to(x_TC.device)
    found = x_TC.index_select(0, place.clamp(min=0).flatten().to(x_TC.device))
    return torch.where(real[..., None], found.view(*real.shape, x_TC.shape[1]), 0.0)

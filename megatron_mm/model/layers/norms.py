"""Normalisation layers. megatron-core's torch norm refuses sequence parallelism and
zero-centred weights, so the model has its own.

torch's norms take 16 bits, compute in fp32 and round once, in one kernel on a GPU. That kernel
wants the weight in the input's type. So the zero-centred norm converts its input: 1 + weight in
bf16 would lose every weight below 0.004.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup

from megatron_mm.parallel.param_layout import constant, place


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), computed in fp32 (Qwen3-Next's zero-centred norm).

    Args:
        partial_gradient: every tensor-parallel rank sees other positions or heads, so the
            weight's gradient is summed over the group.
    """

    def __init__(self, size: int, eps: float, *, partial_gradient: bool, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        place(self.weight, constant(0.0), partial_gradient=partial_gradient)

    def scale(self) -> torch.Tensor:
        """Returns the factor of each feature, fp32."""
        return 1.0 + self.weight.float()

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            scale: `scale()`, if the caller has it.
        """
        weight = self.scale() if scale is None else scale
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).type_as(x)


class GatedRMSNorm(nn.Module):
    """weight * x / rms(x) * silu(gate) over the last dimension (the GDN's output norm)."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        # Each rank applies it to its own heads.
        place(self.weight, constant(1.0), partial_gradient=True)

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(x, x.shape[-1:], None, self.eps)
        return (self.weight * normed * F.silu(gate.float())).type_as(gate)


class VisionLayerNorm(nn.Module):
    """LayerNorm whose input and output are whole on every tensor-parallel rank."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(size, dtype=dtype))
        place(self.weight, constant(1.0))
        place(self.bias, constant(0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class VisionRMSNorm(nn.Module):
    """weight * x / rms(x) (InternViT-6B), whole on every tensor-parallel rank."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        place(self.weight, constant(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class FullWidthRMSNorm(nn.Module):
    """weight * x / rms(x) over all heads together, which are split over tensor-parallel ranks.

    InternViT-6B normalises queries and keys so: the mean square needs the whole group. Features
    past `size` are padding, and zero.
    """

    def __init__(
        self, size: int, local_size: int, eps: float, *, tp: ProcessGroup, dtype: torch.dtype
    ):
        super().__init__()
        self.size, self.eps, self.tp = size, eps, tp
        self.weight = nn.Parameter(torch.empty(local_size, dtype=dtype))
        place(self.weight, constant(1.0), split={0: tp}, whole={0: size})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., heads, D] -> the same"""
        if self.tp.size() == 1:
            flat = F.rms_norm(x.flatten(-2), self.weight.shape, self.weight, self.eps)
            return flat.view(x.shape)
        weight = self.weight.view(x.shape[-2:])
        return _SplitRMSNorm.apply(x, weight, self.size, self.eps, self.tp)


class _SplitRMSNorm(torch.autograd.Function):
    """RMSNorm over the last two dimensions of all ranks together. Sums of squares are reduced in
    the forward pass, those of the gradient along the output in the backward pass. Products round
    to the input's type as they are written, so nothing of its size is ever in fp32."""

    @staticmethod
    def forward(ctx, x, weight, size: int, eps: float, tp: ProcessGroup):
        ctx.size, ctx.tp = size, tp
        wide = torch.promote_types(x.dtype, torch.float32)
        square = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide).square()
        dist.all_reduce(square, group=tp)
        scale = torch.rsqrt(square / size + eps)
        ctx.save_for_backward(x, weight, scale)
        return _scaled(x, scale).mul_(weight)

    @staticmethod
    def backward(ctx, d_out):
        x, weight, scale = ctx.saved_tensors
        normed, d_normed = _scaled(x, scale), d_out * weight
        along = (d_normed * normed).sum((-2, -1), keepdim=True, dtype=scale.dtype)
        dist.all_reduce(along, group=ctx.tp)
        d_weight = (d_out * normed).flatten(0, -3).sum(0)
        d_x = d_normed.addcmul_(normed, along / -ctx.size).mul_(scale)
        return d_x, d_weight, None, None, None


def _scaled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x * scale, multiplied in the type of `scale` and rounded to that of `x`."""
    return torch.mul(x, scale, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))

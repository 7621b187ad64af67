"""Normalisation layers. megatron-core's torch norm refuses sequence parallelism and
zero-centred weights, so the model has its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
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
        normed = F.rms_norm(x.float(), x.shape[-1:], None, self.eps).type_as(x)
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
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], None, self.eps).type_as(x)


class FullWidthRMSNorm(nn.Module):
    """weight * x / rms(x) over a width that is split over tensor-parallel ranks.

    InternViT-6B normalises queries and keys over all heads together, so the mean square
    needs the whole group: the sum of squares is reduced forward and its gradient backward.
    Features past `size` are padding, and zero.
    """

    def __init__(
        self, size: int, local_size: int, eps: float, *, tp: ProcessGroup, dtype: torch.dtype
    ):
        super().__init__()
        self.size, self.eps, self.tp = size, eps, tp
        self.weight = nn.Parameter(torch.empty(local_size, dtype=dtype))
        place(self.weight, constant(1.0), split={0: tp}, whole={0: size})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        square = wide.square().sum(-1, keepdim=True)
        square = copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(square, group=self.tp), group=self.tp
        )
        return self.weight * (wide * torch.rsqrt(square / self.size + self.eps)).type_as(x)

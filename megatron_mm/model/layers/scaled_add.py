"""x + scale * y, scaled per feature, in one pass."""

from __future__ import annotations

import torch


def scaled_add(x: torch.Tensor, y: torch.Tensor, scale_V: torch.Tensor) -> torch.Tensor:
    """x + scale * y, rounded once; x and y [..., V]. The residual and the layer scale of a ViT."""
    return _ScaledAdd.apply(x, y, scale_V)


class _ScaledAdd(torch.autograd.Function):
    """torch's derivative of `addcmul` would multiply by its `value`, which is 1, once more."""

    @staticmethod
    def forward(ctx, x, y, scale_V):
        ctx.save_for_backward(y, scale_V)
        return torch.addcmul(x, y, scale_V)

    @staticmethod
    def backward(ctx, d_out):
        y, scale_V = ctx.saved_tensors
        wanted_y, wanted_scale = ctx.needs_input_grad[1:]
        d_y = d_out * scale_V if wanted_y else None
        d_scale = (d_out * y).flatten(0, -2).sum(0) if wanted_scale else None
        return d_out, d_y, d_scale

"""Outputs and gradients of a function, and how far two of them are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of `wanted`, in fp64 on the CPU."""
    found, wanted = (x.detach().cpu().double() for x in (found, wanted))
    norm = wanted.norm()
    return float((found - wanted).norm() / norm) if norm else float(found.norm())


def both_ways(
    function: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    direction: torch.Tensor,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """The output of a function on a device, and the gradients of its inputs for a gradient
    `direction` of the output; all on the CPU.

    Args:
        dtype: the inputs are converted to it. None: they stay as they are.
    """
    leaves = [x.detach().to(device, dtype, copy=True).requires_grad_() for x in inputs]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, direction.to(device, out.dtype))
    return [out.detach().cpu(), *(gradient.cpu() for gradient in gradients)]

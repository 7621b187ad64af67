"""Outputs and gradients of a function, and how far two of them are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from megatron_mm.benchmark.gpu.visit import Row

# Errors of two runs that round alike are random (F distribution): of one parameter, reached by some
# ten independent roundings, one pair in 14,000 is four times apart; of all together, which a few
# dozen large ones decide, one in 600 twice.
ONE, TOGETHER = 4.0, 2.0


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of `wanted`; of the difference alone, if that is 0. In
    fp64, for tensors on the GPU in fp32 there."""
    exact = torch.float64 if wanted.device.type == "cpu" else torch.float32
    found, wanted = (x.detach().to(wanted.device, exact) for x in (found, wanted))
    norm, apart = float(wanted.norm()), float((found - wanted).norm())
    return apart / norm if norm else apart


def check_errors(
    row: Row, what: str, found: Mapping[str, float], allowed: Mapping[str, float]
) -> None:
    """Compares the errors of tensors with those of another run that rounds alike: the ratio of
    each, and of all together. 0.1 % is always allowed.

    Args:
        found, allowed: relative errors by name.
    """
    ratios = {name: error / (allowed[name] + 1e-3) for name, error in found.items()}
    worst = max(ratios, key=ratios.__getitem__)
    row.note({f"{what}: worst": f"{worst}, {found[worst]:.2g}"})
    row.at_most(f"{what}: worst ratio", ratios[worst], ONE)
    squares = [sum(errors[name] ** 2 for name in found) for errors in (found, allowed)]
    together = (squares[0] / (squares[1] + len(found) * 1e-6)) ** 0.5
    row.at_most(f"{what}: ratio of all", together, TOGETHER)


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

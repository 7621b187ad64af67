"""Running sums that a GPU can repeat bit for bit.

torch's cumsum of real numbers on CUDA has no deterministic way and refuses to run where one is
demanded. Products with triangles of ones have one.
"""

from __future__ import annotations

import torch

BLOCK = 256  # numbers that one product sums; the sums of blocks are summed by another


def running_sum(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """`x.cumsum(dim)`; with `torch.use_deterministic_algorithms` on CUDA by products."""
    if not (x.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return x.cumsum(dim)
    return summed_by_products(x.movedim(dim, -1)).movedim(-1, dim)


def summed_by_products(x: torch.Tensor) -> torch.Tensor:
    """`x.cumsum(-1)` by matrix products in the type of x, which must be real; it need not be
    contiguous."""
    length = x.shape[-1]
    if length <= BLOCK:
        return x @ x.new_ones(length, length).triu_()
    blocks = torch.nn.functional.pad(x, (0, -length % BLOCK)).unflatten(-1, (-1, BLOCK))
    inside = summed_by_products(blocks)
    whole = inside[..., -1]
    before = summed_by_products(whole) - whole
    return (inside + before.unsqueeze(-1)).flatten(-2)[..., :length]

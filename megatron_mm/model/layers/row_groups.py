"""Matrix products of rows that are grouped by expert: in one kernel, or expert by expert.

Shapes: R rows in the order of their experts, E experts, I inputs and O outputs of an expert.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
import torch.nn.functional as F

from megatron_mm import platform

ALIGNMENT = 16  # bytes, of the start of every row and matrix that the kernel reads
CAPABILITIES = (9, 10)  # first numbers: Hopper; Blackwell of data centres
MOST_GROUPS = 1023


class RowGroups(Protocol):
    """The rows of each expert; an expert may have none."""

    def products(self, x_RI: torch.Tensor, weight_EIO: torch.Tensor) -> torch.Tensor:
        """Each expert's rows times its weight, [R, O]."""
        ...

    def weight_gradients(self, d_RO: torch.Tensor, x_RI: torch.Tensor) -> torch.Tensor:
        """Sum of the outer products of each expert's rows, [E, O, I]; zero without any row."""
        ...


def fits_one_kernel(
    capability: tuple[int, int] | None, dtype: torch.dtype, experts: int, features: Iterable[int]
) -> bool:
    """Whether `InOneKernel` multiplies these experts in one kernel and waits for nothing.

    `grouped_mm` takes more than that, but loops over the experts itself then, behind a copy of
    their sizes to the CPU. Its kernel is for bf16 on compute capability 9 and 10 and fewer than
    1,024 groups (torch 2.11, aten/src/ATen/native/cuda: GroupedBlas.cpp, GroupMM.cu).

    Args:
        capability: of the device (`platform.compute_capability`).
        features: inputs and outputs of the products.
    """
    if capability is None or capability[0] not in CAPABILITIES:
        return False
    if dtype is not torch.bfloat16 or experts > MOST_GROUPS:
        return False
    return aligned(dtype, features)


def aligned(dtype: torch.dtype, features: Iterable[int]) -> bool:
    """Whether `grouped_mm` takes rows of these widths, on any device."""
    return all(size * dtype.itemsize % ALIGNMENT == 0 for size in features)


class InOneKernel:
    """Groups whose ends are known on the device of the rows alone.

    Args:
        sizes_E: rows of each expert; integers on any device.
        device: of the rows.
    """

    def __init__(self, sizes_E: torch.Tensor, device: torch.device):
        self.ends_E = platform.moved(sizes_E, device).cumsum(0, dtype=torch.int32)

    def products(self, x_RI: torch.Tensor, weight_EIO: torch.Tensor) -> torch.Tensor:
        """See `RowGroups`."""
        if not len(x_RI):  # nothing to launch a kernel for
            return x_RI.new_empty(0, weight_EIO.shape[-1])
        return F.grouped_mm(x_RI, weight_EIO, offs=self.ends_E)

    def weight_gradients(self, d_RO: torch.Tensor, x_RI: torch.Tensor) -> torch.Tensor:
        """See `RowGroups`."""
        if not len(x_RI):
            return x_RI.new_zeros(len(self.ends_E), d_RO.shape[-1], x_RI.shape[-1])
        # In this order of memory, and no other, the kernel takes experts without rows.
        return F.grouped_mm(d_RO.t(), x_RI, offs=self.ends_E)


class OneByOne:
    """Groups whose sizes are known on the CPU. Rows after the last group are not computed."""

    def __init__(self, sizes: list[int]):
        self.sizes = sizes

    def products(self, x_RI: torch.Tensor, weight_EIO: torch.Tensor) -> torch.Tensor:
        """See `RowGroups`."""
        out = x_RI.new_empty(len(x_RI), weight_EIO.shape[-1])
        rows = sum(self.sizes)
        each = x_RI[:rows].split(self.sizes), weight_EIO, out[:rows].split(self.sizes)
        parts = zip(*each, strict=True)
        for x, weight, y in parts:
            torch.mm(x, weight, out=y)
        return out

    def weight_gradients(self, d_RO: torch.Tensor, x_RI: torch.Tensor) -> torch.Tensor:
        """See `RowGroups`."""
        out = x_RI.new_empty(len(self.sizes), d_RO.shape[-1], x_RI.shape[-1])
        parts = zip(d_RO.split(self.sizes), x_RI.split(self.sizes), out, strict=True)
        for d, x, grad in parts:
            torch.mm(d.t(), x, out=grad)
        return out

"""CUDA's rules about devices and types, and what makes the host wait.

Each check raises the error that CUDA raises, in one line that names the operator and the shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from tools.fake_gpu.process import GPU
from tools.fake_gpu.tensor import GpuTensor

aten = torch.ops.aten

INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
PRODUCTS = {
    *(aten.mm.default, aten.mm.out, aten.bmm.default, aten.bmm.out),
    *(aten.addmm.default, aten.addmm.out, aten.addmm_.default, aten.baddbmm.default),
}
# Beside pointwise operators, whose scalars may be on the CPU, those that take a number from there.
TAKES_CPU_SCALAR = {
    *(aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.fill.Tensor, aten.fill_.Tensor),
    *(aten._foreach_mul.Tensor, aten._foreach_mul_.Tensor),
    *(aten._foreach_div.Tensor, aten._foreach_div_.Tensor),
}
# Of those that return no view: they compute nothing either.
ALLOCATIONS = {
    *(aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided, aten.new_empty_strided),
    *(aten._unsafe_view, aten.lift_fresh, aten.resize_, aten.set_),
}
# Sums that CUDA adds up by atomics, in no fixed order: arguments are (into, dim, index, terms).
ATOMIC = {
    *(aten.index_add.default, aten.index_add_.default),
    *(aten.scatter_add.default, aten.scatter_add_.default),
}
# Operators whose result depends on values say so by these tags: the host waits for them.
WAITING_TAGS = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
REASONS = {"_local_scalar_dense": "item", "_unique2": "unique"}


@cache
def computes(func) -> bool:
    """Whether an operator launches a kernel: it neither only allocates nor returns a part of an
    argument."""
    returned = [r.alias_info for r in func._schema.returns]
    views = any(alias is not None and not alias.is_write for alias in returned)
    return not views and func._overloadpacket not in ALLOCATIONS


def gpu_and_cpu(flat: Sequence[Any]) -> tuple[list[GpuTensor], list[torch.Tensor]]:
    """Returns the tensors among arguments by where they are."""
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, GpuTensor)]
    return there, [t for t in tensors if not isinstance(t, GpuTensor)]


def check_devices(func, args: Sequence[Any], there: list[GpuTensor], here: list) -> None:
    """Refuses a kernel of tensors on two devices; a number on the CPU is no tensor to those that
    take one.

    Raises:
        RuntimeError: CUDA's.
    """
    if not (there and here):
        return
    takes = torch.Tag.pointwise in func.tags or func in TAKES_CPU_SCALAR
    bad = [t for t in here if t.dim() or not takes]
    writes_here = func._schema.is_mutable and any(args[0] is t for t in here)
    if bad or writes_here:
        refuse(func, there, bad or here)
    GPU.recorder.remark(f"{func._overloadpacket.__name__} with a number on the CPU")


def refuse(func, there: Sequence[torch.Tensor], here: Sequence[torch.Tensor]) -> None:
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, "
        f"{GPU.device} {_shapes(there)} and cpu {_shapes(here)}, in {func}"
    )


def _shapes(tensors: Sequence[torch.Tensor]) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)


def check_types(func, there: list[GpuTensor]) -> None:
    """Refuses types that CUDA has no kernel for.

    Raises:
        RuntimeError: a matrix product of integers.
    """
    if func in PRODUCTS and not (there[0].dtype.is_floating_point or there[0].dtype.is_complex):
        kind = str(there[0].dtype).removeprefix("torch.")
        raise RuntimeError(f'"addmm_cuda" not implemented for {kind} ({func})')


def check_generator(func, kwargs: dict[str, Any]) -> None:
    """Refuses to draw on the GPU from a CPU generator.

    Raises:
        RuntimeError: CUDA's.
    """
    given = kwargs.get("generator")
    if given is not None and given is not torch.default_generator:
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' in {func}")


def check_indexing(func, args: Sequence[Any]) -> None:
    """Indexes of a CPU tensor must be on the CPU. Those of a GPU tensor may be, but must be copied,
    and a mask must be counted: for both the host waits.

    Raises:
        RuntimeError: CUDA's.
    """
    base, indices, value = args[0], args[1], args[2] if len(args) > 2 else None
    on_gpu = isinstance(base, GpuTensor)
    # A mask that is filled with one number is no index (`masked_fill`).
    fills = isinstance(value, torch.Tensor) and value.numel() == 1
    for index in indices:
        if index is None:
            continue
        if isinstance(index, GpuTensor) and not on_gpu:
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        if on_gpu and not isinstance(index, GpuTensor):
            GPU.wait("index from the CPU")
        if on_gpu and index.dtype in (torch.bool, torch.uint8) and not fills:
            GPU.wait("index by a mask")
    if isinstance(value, torch.Tensor) and isinstance(value, GpuTensor) != on_gpu:
        number = value.dim() == 0 and not isinstance(value, GpuTensor)
        if not number:
            refuse(func, [base], [value])


def in_no_order(func, args: tuple) -> tuple:
    """Returns the arguments of an operator, on the CPU; those of a sum by atomics with its terms
    the other way round on every second rank. Ranks that compute the same in that way part."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if func not in ATOMIC or rank % 2 == 0 or GPU.capture is not None:
        return args
    into, dim, index, terms, *rest = args
    if not into.is_floating_point() or not terms.dim():
        return args
    return into, dim, index.flip(dim if index.dim() > 1 else 0), terms.flip(dim), *rest


def note_wait(func, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Counts a wait if the host needs values that the GPU computes."""
    if func in INDEXING or not WAITING_TAGS & set(func.tags):
        return
    if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None:
        return
    name = func._overloadpacket.__name__
    GPU.wait(REASONS.get(name, name))

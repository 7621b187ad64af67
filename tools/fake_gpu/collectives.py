"""NCCL's rules over gloo.

A group of backend "nccl" is gloo's under NCCL's name and takes tensors of the GPU only. Their
numbers travel through a twin of the group that is registered for the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import ProcessGroupGloo
from torch.utils import _pytree as pytree

from tools.fake_gpu.process import GPU
from tools.fake_gpu.tensor import GpuTensor

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# torch/csrc/cuda/nccl.cpp: int16 is not among them.
TYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
}
BARRIERS = ("barrier", "monitored_barrier_")
_TWINS: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


class PretendedNCCL(ProcessGroupGloo):
    """gloo's group, made as NCCL's is. Groups of one rank share a device, since each device has a
    thread of its own."""

    class Options:
        def __init__(self, *args: Any, **kwargs: Any):
            self.is_high_priority_stream = False
            self.config = _Options()
            self._timeout: Any = None

    shared_device: Any = None

    def __init__(self, store, rank: int, size: int, options: Options):
        if size > 1:
            super().__init__(store, rank, size, options._timeout)
            return
        if PretendedNCCL.shared_device is None:
            PretendedNCCL.shared_device = ProcessGroupGloo.create_default_device()
        gloo = ProcessGroupGloo._Options()
        gloo._devices, gloo._timeout = [PretendedNCCL.shared_device], options._timeout
        super().__init__(store, rank, size, gloo)


class _Options:
    """NCCL's own settings of a communicator; any may be set."""


def run(func, args: tuple, kwargs: dict[str, Any], there: list[GpuTensor], here: list) -> Any:
    """Runs a collective.

    Raises:
        RuntimeError: NCCL or torch's dispatcher would refuse it.
    """
    group = _group(args, kwargs)
    name = func._overloadpacket.__name__
    devices = {device.type for device in group._device_types}
    if name in BARRIERS:
        here = []
    for kind, tensors in (("cpu", here), ("cuda", there)):
        if tensors and kind not in devices:
            shapes = [tuple(t.shape) for t in tensors]
            raise RuntimeError(
                f"No backend type associated with device type {kind}: {name} of {shapes} in group "
                f"{group.group_name} of {sorted(devices)}"
            )
    if not there and not (name in BARRIERS and "cpu" not in devices):
        return func(*args, **kwargs)
    if dist.get_backend(group) == "nccl":
        for tensor in there:
            _check(name, tensor)
        if name in BARRIERS:
            GPU.wait("barrier")
    else:  # gloo's copies them to the CPU and back
        GPU.wait("gloo")
    GPU.launch(f"c10d {name}")
    GPU.refuse_in_capture(f"c10d {name}")  # CUDA takes NCCL's; nothing here records them
    twin = _twin(group)
    if name in UNEVEN and (done := UNEVEN[name](twin, args)):
        return done

    def swapped(x: Any) -> Any:
        if isinstance(x, GpuTensor):
            return x.host
        return twin.boxed() if _unboxed(x) is not None else x

    out = func(*pytree.tree_map(swapped, args), **pytree.tree_map(swapped, kwargs))
    known = {id(t.host): t for t in there}
    return pytree.tree_map_only(
        torch.Tensor, lambda t: known[id(t)] if id(t) in known else GpuTensor(t), out
    )


def _group(args: tuple, kwargs: dict[str, Any]) -> dist.ProcessGroup:
    (group,) = filter(None, map(_unboxed, (*args, *kwargs.values())))
    return group


def _unboxed(x: object) -> dist.ProcessGroup | None:
    """The group in a script object, where it is one."""
    if not isinstance(x, torch.ScriptObject) or "ProcessGroup" not in str(x._type()):
        return None
    return dist.ProcessGroup.unbox(x)


def _check(name: str, tensor: GpuTensor) -> None:
    if tensor.dtype not in TYPES:
        raise TypeError(f"Input tensor data type is not supported for NCCL: {tensor.dtype}")
    if not tensor.host.is_contiguous():
        raise ValueError(f"Tensors must be contiguous: {name} of {tuple(tensor.shape)}")


def _twin(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group again, whose backend is registered for the CPU."""
    if group not in _TWINS:
        twin = dist.ProcessGroup(dist.HashStore(), group.rank(), group.size())
        twin._register_backend(CPU, dist.ProcessGroup.BackendType.GLOO, group._get_backend(CUDA))
        _TWINS[group] = twin
    return _TWINS[group]


# ---- parts of different lengths, which NCCL takes and gloo does not


def _gather_uneven(twin: dist.ProcessGroup, args: tuple) -> tuple | None:
    (parts,), (mine,) = args[0], args[1]
    if len({t.shape for t in (*parts, mine)}) == 1:
        return None
    parts[twin.rank()].host.copy_(mine.host.view_as(parts[twin.rank()].host))
    work = None
    for root, part in enumerate(parts):
        options = dist.BroadcastOptions()
        options.rootRank = root
        work = twin.broadcast([part.host], options)
        work.wait()
    return [list(parts)], work.boxed()  # type: ignore[union-attr]


def _scatter_uneven(twin: dist.ProcessGroup, args: tuple) -> tuple | None:
    (mine,), (parts,) = args[0], args[1]
    if len({t.shape for t in (*parts, mine)}) == 1:
        return None
    work = None
    for root, part in enumerate(parts):
        options = dist.ReduceOptions()
        options.rootRank = root
        summed = part.host.clone()
        work = twin.reduce([summed], options)
        work.wait()
        if root == twin.rank():
            mine.host.copy_(summed.view_as(mine.host))
    return [mine], work.boxed()  # type: ignore[union-attr]


UNEVEN: dict[str, Callable[[dist.ProcessGroup, tuple], tuple | None]] = {
    "allgather_": _gather_uneven,
    "reduce_scatter_": _scatter_uneven,
}

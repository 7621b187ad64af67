"""Runs every operator of torch: checks it, counts it, computes it on the CPU.

`Operators` sees each call below autograd. Calls without a tensor of the GPU, and without a wish
for one, pass through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tools.fake_gpu import collectives, rules
from tools.fake_gpu.process import GPU
from tools.fake_gpu.tensor import GpuTensor

aten = torch.ops.aten
CPU = torch.device("cpu")


class Operators(TorchDispatchMode):
    """Entered once, for the life of the process."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Runs one operator as the GPU would.

    Raises:
        RuntimeError: CUDA would refuse it.
    """
    flat = pytree.tree_leaves((args, kwargs))
    there, here = rules.gpu_and_cpu(flat)
    if func.namespace == "c10d":
        return collectives.run(func, args, kwargs, there, here)
    device = kwargs.get("device")
    wanted = device is not None and device.type in ("meta", "cuda")
    if not there and (not wanted or GPU.means_meta):
        return func(*args, **kwargs)
    if func is aten._to_copy.default:
        return _moved(args[0], kwargs, wanted or (bool(there) and device is None))
    if func is aten.copy_.default:
        return _copied(*args, **kwargs)
    if func in rules.INDEXING:
        rules.check_indexing(func, args)
    else:
        rules.check_devices(func, args, there, here)
    if there:
        rules.check_types(func, there)
    rules.check_generator(func, kwargs)
    rules.note_wait(func, args, kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    if device is not None:
        kwargs["device"] = CPU
    out = GPU.compute(func, *rules.in_no_order(func, _hosts(args)), **_hosts(kwargs))
    if device is not None and not wanted:  # `zeros_like(x, device="cpu")`
        return out
    if rules.computes(func):
        GPU.launch(func._overloadpacket.__name__)
    return _wrapped(func, out, there)


def _hosts(tree: Any) -> Any:
    return pytree.tree_map_only(GpuTensor, lambda t: t.host, tree)


def _wrapped(func, out: Any, there: list[GpuTensor]) -> Any:
    """Results as tensors of the GPU; one that was written in place is the one that was given."""
    known = {id(t.host): t for t in there}

    def back(host: torch.Tensor) -> torch.Tensor:
        given = known.get(id(host))
        if given is None:
            return GpuTensor(host)
        if given.shape != host.shape or given.stride() != host.stride():
            raise NotImplementedError(f"the fake GPU cannot change a shape in place: {func}")
        return given

    return pytree.tree_map_only(torch.Tensor, back, out)


# ---- copies between the two memories


def _moved(source: torch.Tensor, kwargs: dict[str, Any], to_gpu: bool) -> torch.Tensor:
    """`Tensor.to` where it copies."""
    leaves_host = kwargs.get("non_blocking", False)
    was_there = isinstance(source, GpuTensor)
    host = source.host if isinstance(source, GpuTensor) else source
    kept = {k: v for k, v in kwargs.items() if k in ("dtype", "layout", "memory_format")}
    out = GPU.compute(aten._to_copy.default, host, **kept)
    if to_gpu:
        if not was_there:
            _arriving(source, leaves_host)
        GPU.launch("_to_copy")
        return GpuTensor(out)
    if leaves_host:  # into pinned memory, as torch allocates it then
        GPU.pin(out)
        GPU.send(out, out)
    else:
        GPU.wait("copy to the CPU")
    GPU.launch("_to_copy")
    return out


def _copied(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`Tensor.copy_`, also between the two memories."""
    into = target.host if isinstance(target, GpuTensor) else target
    out_of = source.host if isinstance(source, GpuTensor) else source
    if isinstance(target, GpuTensor) and not isinstance(source, GpuTensor):
        _arriving(source, non_blocking)
    elif isinstance(source, GpuTensor) and not isinstance(target, GpuTensor):
        if non_blocking and GPU.has_pinned(target):
            GPU.launch("copy_")
            GPU.send(target, out_of.expand_as(target).to(target.dtype))
            return target
        GPU.wait("copy to the CPU")
    GPU.launch("copy_")
    GPU.compute(aten.copy_.default, into, out_of)
    return target


def _arriving(source: torch.Tensor, leaves_host: bool) -> None:
    """Counts the wait of a copy from the CPU."""
    if not leaves_host:
        GPU.wait("copy from the CPU")
    elif not GPU.has_pinned(source):
        GPU.refuse_in_capture("copy from memory that is not pinned")
        GPU.recorder.remark("copy from memory that is not pinned")

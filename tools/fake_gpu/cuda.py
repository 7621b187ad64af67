"""Replacements in torch.cuda and beside it.

Streams and events are in order: nothing here runs beside anything else. The GPU's generator is the
CPU's, so both draw the same numbers.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import checkpoint

from tools.fake_gpu.functions import Functions
from tools.fake_gpu.graphs import CUDAGraph, graph
from tools.fake_gpu.process import DEVICES, GPU, MEMORY, NAME
from tools.fake_gpu.tensor import GpuTensor

CHECKPOINT = checkpoint.checkpoint


class Replacement(NamedTuple):
    """A new value of an attribute."""

    owner: Any
    name: str
    value: Any


class Stream:
    """In order with all others."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any):
        self.device = GPU.device

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None:
        GPU.wait("stream.synchronize")

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    __hash__ = object.__hash__


class Event:
    """Reached as soon as it is recorded; no time passes between two."""

    def __init__(self, *args: Any, **kwargs: Any): ...

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None:
        GPU.wait("event.synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0


class Properties(NamedTuple):
    """Of an H100."""

    name: str = NAME
    major: int = 9
    minor: int = 0
    total_memory: int = MEMORY
    multi_processor_count: int = 132
    warp_size: int = 32
    L2_cache_size: int = 50 << 20
    shared_memory_per_block_optin: int = 232_448
    max_threads_per_multi_processor: int = 2048
    regs_per_multiprocessor: int = 65_536
    gcnArchName: str = ""


def _always(value: Any):
    return lambda *args, **kwargs: value


def _set_device(device: Any) -> None:
    """Chooses this rank's device.

    Raises:
        RuntimeError: the machine has fewer.
    """
    index = device if isinstance(device, int) else torch.device(device).index
    if index is not None and index >= DEVICES:
        raise RuntimeError(f"invalid device ordinal: {index} of {DEVICES} fake GPUs")
    if index is not None and index >= 0:
        GPU.index = index


def _uncompiled(function=None, **kwargs: Any):
    """`torch.compile` that compiles nothing: its kernels are counted one by one."""
    if function is None:
        return lambda decorated: _uncompiled(decorated, **kwargs)
    if isinstance(function, nn.Module):
        return function

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any):
        return function(*args, **kwargs)

    return called


def _checkpoint(function, *args: Any, **kwargs: Any):
    """torch's `checkpoint`, whose function comes through `Functions` when it is repeated too:
    inside autograd no such mode is on."""

    def called(*args: Any, **kwargs: Any):
        if torch._C._is_torch_function_mode_enabled():
            return function(*args, **kwargs)
        with Functions():
            return function(*args, **kwargs)

    return CHECKPOINT(called, *args, **kwargs)


def _apply(self: nn.Module, function, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`. On CUDA a parameter that moves stays the same object and its data is
    exchanged; here it becomes another object, with the same attributes, the same for all modules
    that share it."""
    moved: dict[int, nn.Parameter] = {}
    for module in self.modules() if recurse else [self]:
        for name, param in module._parameters.items():
            if param is not None:
                if id(param) not in moved:
                    moved[id(param)] = _moved(param, function)
                module._parameters[name] = moved[id(param)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
    return self


def _moved(param: nn.Parameter, function) -> nn.Parameter:
    with torch.no_grad():
        data = function(param)
    if data is param:
        return param
    if isinstance(data, GpuTensor) == isinstance(param, GpuTensor):
        param.data = data
        return param
    new = nn.Parameter(data, param.requires_grad)
    vars(new).update({name: value for name, value in vars(param).items() if name != "host"})
    return new


REPLACEMENTS = [
    Replacement(torch.cuda, name, value)
    for name, value in {
        "is_available": _always(True),
        "is_initialized": _always(True),
        "init": _always(None),
        "_lazy_init": _always(None),
        "device_count": _always(DEVICES),
        "current_device": lambda: GPU.index,
        "set_device": _set_device,
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda device=None: GPU.wait("cuda.synchronize"),
        "Stream": Stream,
        "Event": Event,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "set_stream": _always(None),
        "empty_cache": _always(None),
        "memory_allocated": _always(0),
        "max_memory_allocated": _always(0),
        "memory_reserved": _always(0),
        "max_memory_reserved": _always(0),
        "reset_peak_memory_stats": _always(None),
        "memory_stats": _always({}),
        "mem_get_info": _always((MEMORY, MEMORY)),
        "default_generators": (torch.default_generator,) * DEVICES,
        "get_device_capability": _always((9, 0)),
        "get_device_name": _always(NAME),
        "get_device_properties": _always(Properties()),
        "is_bf16_supported": _always(True),
        "is_current_stream_capturing": lambda: GPU.capture is not None,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "graph_pool_handle": _always((0, 0)),
    }.items()
] + [
    Replacement(torch.cuda.random, "current_device", lambda: GPU.index),
    Replacement(torch.cuda.random, "device_count", _always(DEVICES)),
    Replacement(torch.cuda.nvtx, "range_push", _always(None)),
    Replacement(torch.cuda.nvtx, "range_pop", _always(None)),
    Replacement(torch, "compile", _uncompiled),
    Replacement(checkpoint, "checkpoint", _checkpoint),
    Replacement(nn.Module, "_apply", _apply),
    Replacement(nn.Module, "cuda", lambda self, device=None: self.to(GPU.device)),
]

"""The calls with which megatron-core assumes a GPU, and what stands in for them without CUDA.

Each table entry names the megatron-core line that needs it. `platform.install` puts them in place.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch.distributed.distributed_c10d import ProcessGroupGloo

CPU = torch.device("cpu")
# Device used in place of the GPU; `platform.standing_in` changes it.
STAND_IN: ContextVar[torch.device] = ContextVar("stand_in", default=CPU)
# Device that gloo groups of one rank share; `platform.groups_of_one_share` sets it.
SHARED_DEVICE: ContextVar[Any] = ContextVar("shared_device", default=None)


class Redirect(NamedTuple):
    """Replacement of an attribute, and the megatron-core code that needs it."""

    owner: str  # import path of a module, or "module:Class"
    name: str
    replacement: Any
    why: str


class _InertStream:
    """Replacement of torch.cuda.Stream and Event: on the CPU all operations are in order."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def record_event(self, event=None):
        return event or _InertStream()

    def elapsed_time(self, other):
        return 0.0

    def __eq__(self, other):
        return isinstance(other, _InertStream)


def _always(value):
    """Returns a new constant function: dynamo rejects one object under two torch names."""
    return lambda *args, **kwargs: value


def _current_device():
    return STAND_IN.get()


def _uncompiled(function=None, **kwargs):
    return function if function is not None else _uncompiled_decorator


def _uncompiled_decorator(function):
    return function


def _get_rng_state(device=None):
    return torch.get_rng_state()


def _set_rng_state(state, device=None, **kwargs):
    torch.set_rng_state(state)


def _is_cuda_name(device) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(factory):
    """Wraps a tensor factory so that device="cuda" means the CPU."""

    @functools.wraps(factory)
    def create(*args, device=None, **kwargs):
        if device is not None:
            kwargs["device"] = STAND_IN.get() if _is_cuda_name(device) else device
        kwargs.pop("pin_memory", None)  # needs a CUDA driver
        return factory(*args, **kwargs)

    return create


def _tensor_to(original):
    @functools.wraps(original)
    def to(self, *args, **kwargs):
        if args and _is_cuda_name(args[0]):
            args = (STAND_IN.get(), *args[1:])
        if _is_cuda_name(kwargs.get("device")):
            kwargs["device"] = STAND_IN.get()
        return original(self, *args, **kwargs)

    return to


def _same():
    """Returns a method that returns its object, for any device."""
    return lambda self, *args, **kwargs: self


def _tensor_type(original):
    """Makes `Tensor.type()` return the CUDA type, with which megatron's optimizer compares."""

    @functools.wraps(original)
    def type_(self, *args, **kwargs):
        if args or kwargs:
            return original(self, *args, **kwargs)
        return "torch.cuda." + original(self).rpartition(".")[2]

    return type_


def _all_gather(original):
    """Pads parts to the longest and cuts them again: gloo's all-gather needs equal lengths."""

    @functools.wraps(original)
    def all_gather(tensor_list, tensor, group=None, async_op=False):
        lengths = {part.shape[0] if part.dim() else 1 for part in tensor_list}
        if len(lengths) <= 1 and (not tensor.dim() or tensor.shape[0] in lengths):
            return original(tensor_list, tensor, group=group, async_op=async_op)
        if async_op:
            raise RuntimeError("gloo gathers parts of different lengths only with async_op=False")
        longest = max(lengths)
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        parts = [torch.empty_like(padded) for _ in tensor_list]
        original(parts, padded, group=group)
        for target, part in zip(tensor_list, parts, strict=True):
            target.copy_(part[: target.shape[0]])
        return None

    return all_gather


def _reduce_scatter(original):
    """All-reduces all parts and keeps this rank's: gloo has no uneven reduce-scatter."""

    @functools.wraps(original)
    def reduce_scatter(output, input_list, op=torch.distributed.ReduceOp.SUM, group=None, **kwargs):
        if len({part.shape for part in input_list}) <= 1:
            return original(output, input_list, op=op, group=group, **kwargs)
        whole = torch.cat(list(input_list))
        torch.distributed.all_reduce(whole, op=op, group=group)
        start = sum(part.shape[0] for part in input_list[: torch.distributed.get_rank(group)])
        output.copy_(whole[start : start + output.shape[0]])
        return None

    return reduce_scatter


class _Gloo(ProcessGroupGloo):
    """gloo group that may share its device; see `platform.groups_of_one_share`."""

    def __init__(self, store, rank, size, timeout):
        device = SHARED_DEVICE.get()
        if size > 1 or device is None:
            super().__init__(store, rank, size, timeout)
            return
        options = ProcessGroupGloo._Options()
        options._devices, options._timeout = [device], timeout
        super().__init__(store, rank, size, options)


def _maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
    if torch.is_tensor(tensor) and as_numpy:
        return tensor.numpy()
    return tensor


FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn", "empty_like")

TORCH_REDIRECTS = [
    Redirect("torch", "compile", _uncompiled, "jit.py compiles small functions: slow to start"),
    Redirect("torch.cuda", "current_device", _current_device, "mappings.py:145 allocates there"),
    Redirect("torch.cuda", "set_device", _always(None), "initialisers pick the local GPU"),
    Redirect("torch.cuda", "device_count", _always(1), "parallel_state sanity checks"),
    Redirect("torch.cuda", "synchronize", _always(None), "p2p_communication.py after batched p2p"),
    Redirect("torch.cuda", "current_stream", _InertStream, "token_dispatcher.py:924"),
    Redirect("torch.cuda", "default_stream", _InertStream, "distributed_data_parallel.py"),
    Redirect("torch.cuda", "Stream", _InertStream, "token_dispatcher.py, param_and_grad_buffer"),
    Redirect("torch.cuda", "Event", _InertStream, "param_and_grad_buffer.py"),
    Redirect("torch.cuda", "stream", lambda s: contextlib.nullcontext(), "token_dispatcher.py:927"),
    Redirect("torch.cuda", "empty_cache", _always(None), "optimizer loading"),
    Redirect("torch.cuda", "memory_allocated", _always(0), "logging of memory"),
    Redirect("torch.cuda", "max_memory_allocated", _always(0), "logging of memory"),
    Redirect("torch.cuda", "reset_peak_memory_stats", _always(None), "logging of memory"),
    Redirect("torch.cuda", "get_rng_state", _get_rng_state, "tensor_parallel/random.py"),
    Redirect("torch.cuda", "set_rng_state", _set_rng_state, "tensor_parallel/random.py"),
    Redirect(
        "torch.cuda", "manual_seed", lambda s: torch.manual_seed(s), "tensor_parallel/random.py"
    ),
    Redirect("torch.cuda.nvtx", "range_push", _always(None), "utils.py nvtx ranges"),
    Redirect("torch.cuda.nvtx", "range_pop", _always(None), "utils.py nvtx ranges"),
    *(
        Redirect("torch", name, _on_cpu(getattr(torch, name)), "device='cuda' in schedules.py:2292")
        for name in FACTORIES
    ),
    Redirect("torch:Tensor", "cuda", _same(), "distrib_optimizer.py:1374"),
    Redirect("torch:Tensor", "to", _tensor_to(torch.Tensor.to), "clip_grads.py, optimizer.py"),
    Redirect("torch:Tensor", "type", _tensor_type(torch.Tensor.type), "distrib_optimizer.py:466"),
    Redirect("torch.nn:Module", "cuda", _same(), "model set-up"),
    Redirect(
        "torch.distributed",
        "all_gather",
        _all_gather(torch.distributed.all_gather),
        "mappings.py:154 gathers uneven splits (expert-TP = TP with EP)",
    ),
    Redirect(
        "torch.distributed",
        "reduce_scatter",
        _reduce_scatter(torch.distributed.reduce_scatter),
        "mappings.py: reduce-scatter of uneven splits",
    ),
    Redirect(
        "torch.distributed.distributed_c10d",
        "ProcessGroupGloo",
        _Gloo,
        "parallel_state.py makes a group for every set of ranks",
    ),
]

MEGATRON_REDIRECTS = [
    Redirect(
        f"megatron.core.transformer.moe.{module}",
        "maybe_move_tensor_to_cpu",
        _maybe_move_tensor_to_cpu,
        "moe_utils.py:1184 converts split sizes to numpy only for CUDA tensors",
    )
    for module in ("moe_utils", "token_dispatcher")
] + [
    Redirect(
        "megatron.core.tensor_parallel.random",
        "_get_cuda_rng_state",
        lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state(),
        "tensor_parallel/random.py reads the CUDA generator",
    ),
    Redirect(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state),
        "tensor_parallel/random.py writes the CUDA generator",
    ),
]


def owner(path: str):
    module, _, cls = path.partition(":")
    owner = importlib.import_module(module)
    return getattr(owner, cls) if cls else owner


def installed() -> bool:
    """Whether the redirects are in place, all of them: importing megatron-core may have failed."""
    return torch.compile is _uncompiled and all(
        getattr(sys.modules.get(redirect.owner), redirect.name, None) is redirect.replacement
        for redirect in MEGATRON_REDIRECTS
    )


def put_in_place() -> None:
    # torch first, because importing megatron reads the current device.
    for table in (TORCH_REDIRECTS, MEGATRON_REDIRECTS):
        for redirect in table:
            setattr(owner(redirect.owner), redirect.name, redirect.replacement)

"""Runs megatron-core's layers, schedules and optimizer without CUDA.

`install()` is called once, before the first `megatron` import. With CUDA it does nothing. Without,
it redirects the few calls with which megatron-core assumes a GPU to CPU equivalents
(`redirects.py`); collectives run on gloo.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch.distributed.distributed_c10d import ProcessGroupGloo
from torch.utils._device import _device_constructors

from megatron_mm.redirects import SHARED_DEVICE, STAND_IN, installed, put_in_place

MEGATRON_CORE_VERSION = "0.19.2"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Compute capability of the GPU that the device of `standing_in` stands for, if it stands for one.
_CAPABILITY: ContextVar[tuple[int, int] | None] = ContextVar("capability", default=None)


def end_with_parent() -> None:
    """Under torchrun on Linux, makes the kernel kill this rank when its torchrun agent dies. A
    killed agent cannot stop its ranks, which would keep waiting for others on the GPU."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before prctl
        sys.exit("error: the agent that started this rank is gone")


def quiet() -> None:
    """Silences megatron-core's notices about optional packages and deprecations. Commands call it
    before `install`, whose imports cause them."""
    warnings.simplefilter("ignore")
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def _absent(*names: str) -> Iterator[None]:
    """Inside, modules that have not been imported cannot be."""
    held = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(held))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in held:
            del sys.modules[name]


def hide_gpus() -> None:
    """Makes this process, and those it starts, ones of a machine without CUDA. Before `install`.

    Raises:
        RuntimeError: CUDA was started here and cannot be hidden any more.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when CUDA starts, not when torch is imported
    if torch.cuda.is_available():
        raise RuntimeError("this process has started CUDA; do it in a process of its own")


def install() -> bool:
    """Makes megatron-core run on this machine. Returns whether anything was redirected.

    Raises:
        RuntimeError: megatron-core is not the version these redirects were written for, or was
            imported already: what it took from torch by then would stay.
    """
    if torch.cuda.is_available():
        return False
    if installed():
        return True
    found = importlib.metadata.version("megatron-core")
    if found != MEGATRON_CORE_VERSION:
        raise RuntimeError(
            f"without CUDA, megatron_mm needs megatron-core {MEGATRON_CORE_VERSION} "
            f"(found {found}): pip install megatron-core=={MEGATRON_CORE_VERSION}"
        )
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "megatron-core was imported before its redirects to the CPU were in place; call "
            "megatron_mm.platform.install() first"
        )
    # torch caches the set of factories that `with torch.device(...)` affects, by function object.
    # Filled before they are replaced; otherwise the context would affect none of them, and
    # `from_pretrained`, which builds models on "meta", would leave buffers without values.
    _device_constructors()
    # Only Timers of megatron-core use them, which nothing here does: a quarter of the time that a
    # rank takes to start. Putting the redirects in place imports megatron-core, behind those of
    # torch: before, its small functions would keep the real torch.compile.
    with _absent("wandb", "tensorboard"):
        put_in_place()
    return True


def device() -> torch.device:
    """Device this rank computes on."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return STAND_IN.get()


def moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Returns `tensor` on `device`. On the way to a GPU it passes through pinned memory: from any
    other the host would wait until the GPU has done all its work."""
    there = torch.device(device).type
    if there == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    # On the way back the host would find memory that is not filled yet.
    return tensor.to(device, non_blocking=there != "cpu")


@contextlib.contextmanager
def standing_in(device: torch.device, capability: tuple[int, int] | None = None) -> Iterator[None]:
    """Computes on `device` in place of the CPU inside the context, such as "meta", whose tensors
    have no memory. Needs `install`, and a machine without CUDA.

    Args:
        capability: of the GPU that it stands for; None: it stands for the CPU.
    Raises:
        RuntimeError: the redirects are not installed.
    """
    if not installed():
        raise RuntimeError("nothing stands in for a GPU before platform.install(), or beside one")
    before, capable = STAND_IN.set(device), _CAPABILITY.set(capability)
    try:
        yield
    finally:
        STAND_IN.reset(before)
        _CAPABILITY.reset(capable)


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of the GPU that a tensor's device is, or stands for; None for what is
    no GPU. Whoever has a faster way on a GPU asks here: a plan then follows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)
    return _CAPABILITY.get() if device.type == STAND_IN.get().type else None


@contextlib.contextmanager
def groups_of_one_share() -> Iterator[None]:
    """Without CUDA, makes gloo groups of one rank created inside the context share a device.
    Otherwise each would have its own, with a thread that polls a hundred times a second, and
    megatron-core makes about 25 groups, most of one rank. The device ends with its last group."""
    before = SHARED_DEVICE.set(
        None if torch.cuda.is_available() else ProcessGroupGloo.create_default_device()
    )
    try:
        yield
    finally:
        SHARED_DEVICE.reset(before)


def backend() -> str:
    """Process-group backend of that device."""
    return "nccl" if torch.cuda.is_available() else "gloo"

"""Measurements on a GPU: milliseconds by events, kernels by the profiler, waits of the host."""

from __future__ import annotations

import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megatron_mm.benchmark.measure import turns

SYNCHRONIZED = "called a synchronizing CUDA operation"  # torch's warning
# Calls of CUDA's that put work on a stream, or wait for it, as the profiler names them.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")


def milliseconds(function: Callable[[], Any]) -> float:
    """Time of one call on the device, from its first kernel to its last."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def medians[K](
    sides: Mapping[K, Callable[[], Any]], rounds: int, warmup: int = 2
) -> dict[K, float]:
    """Median milliseconds of each side. They are called in turn, so that a clock that falls or
    another program slows all alike."""
    found: dict[K, list[float]] = {name: [] for name in sides}
    for order in turns(sides, warmup + rounds):
        for name in order:
            found[name].append(milliseconds(sides[name]))
    return {name: statistics.median(times[warmup:]) for name, times in found.items()}


@dataclass(frozen=True)
class Kernels:
    """Work of the device during a call.

    Attributes:
        count: kernels and copies that ran.
        launches: calls that sent them; a CUDA graph is one.
        waits: calls in which the host waits for a stream or an event.
        busy: milliseconds that kernels took, one after the other.
        top: the longest by name: milliseconds and number of calls.
    """

    count: int
    launches: int
    waits: int
    busy: float
    top: dict[str, tuple[float, int]]


def kernels(function: Callable[[], Any], fake: Any = None, most: int = 15) -> Kernels:
    """Runs a call under torch's profiler. All zero where that sees no kernels: CUPTI may be
    forbidden to users.

    Args:
        fake: the GPU, if it is one that only counts (`tools/fake_gpu`).
    """
    if fake is not None:
        with fake.counting() as counts:
            function()
        total, top = counts.launches.total(), counts.launches.by("what").most_common(most)
        waited = counts.waits.total()
        return Kernels(total, total, waited, 0.0, {name: (0.0, count) for name, count in top})
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        function()
        torch.cuda.synchronize()
    events = seen.key_averages()
    ran = [event for event in events if event.device_type == DeviceType.CUDA]
    ran.sort(key=lambda event: -event.self_device_time_total)
    calls = Counter({event.key: event.count for event in events})
    return Kernels(
        sum(event.count for event in ran),
        sum(count for name, count in calls.items() if name.startswith(LAUNCHES)),
        sum(calls[name] for name in WAITS),
        sum(event.self_device_time_total for event in ran) / 1e3,
        {e.key[:100]: (round(e.self_device_time_total / 1e3, 3), e.count) for e in ran[:most]},
    )


def waits(function: Callable[[], Any], fake: Any = None) -> Counter[str]:
    """Times that the host waited for the device during a call, by line of Python. torch warns of
    values that the host reads, not of events that it waits for: `Kernels.waits` has those too.

    Args:
        fake: as for `kernels`.
    """
    torch.cuda.synchronize()
    if fake is not None:
        with fake.counting() as counts:
            function()
        return counts.waits.by("site")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.cuda.set_sync_debug_mode("warn")
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{Path(warning.filename).name}:{warning.lineno}"
        for warning in caught
        if SYNCHRONIZED in str(warning.message)
    )

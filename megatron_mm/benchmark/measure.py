"""Measures time and memory."""

from __future__ import annotations

import gc
import platform as machine
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor


def environment() -> dict[str, Any]:
    """Processor, number of threads, and versions that the numbers depend on."""
    cpu = machine.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if "name" in x]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": machine.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "megatron-core")},
    }


def revision() -> str:
    """Git revision of the code, with a + if it has changed; "unknown" outside of a checkout or
    without git."""
    root = Path(__file__).parents[2]
    found = []
    for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"]):
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
        except OSError:  # no git here
            return "unknown"
        if done.returncode:
            return "unknown"
        found.append(done.stdout.strip())
    return found[0] + "+" * bool(found[1])


class Timed(NamedTuple):
    """Result of a timed call: wall-clock and processor seconds, and the returned value."""

    seconds: float
    cpu: float
    result: Any


def timed(function: Callable[[], Any]) -> Timed:
    begin, cpu = time.perf_counter(), time.process_time()
    result = function()
    return Timed(time.perf_counter() - begin, time.process_time() - cpu, result)


def interleave(sides: Sequence[Callable[[int], Any]], rounds: int) -> list[list[Timed]]:
    """Calls `sides[s](round)` in every round, in turn, so that other load on the machine slows all
    sides alike.

    Returns:
        Timings by side and round.
    """
    found: list[list[Timed]] = [[] for _ in sides]
    for number, order in enumerate(turns(range(len(sides)), rounds)):
        for side in order:
            found[side].append(timed(partial(sides[side], number)))
    return found


def turns[T](sides: Iterable[T], rounds: int) -> Iterator[list[T]]:
    """Yields the order of the sides in every round: each second one goes backwards, and after two
    the next side begins. So each is first and last as often, before and after each other one."""
    order = list(sides)
    for number in range(rounds):
        yield order[::-1] if number % 2 else [*order]
        if number % 2:
            order.append(order.pop(0))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Returns the first and the third quartile of these values, which lie among them."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def ratios(slower: Sequence[Timed], faster: Sequence[Timed]) -> dict[str, Any]:
    """Returns the `ratio` of median wall-clock times, the quartiles of single rounds' ratios, and
    the same for processor time, which other programs disturb less."""
    made: dict[str, Any] = {"rounds": len(slower)}
    for name, field in (("ratio", "seconds"), ("cpu_ratio", "cpu")):
        a, b = ([getattr(run, field) for run in side] for side in (slower, faster))
        paired = [x / y for x, y in zip(a, b, strict=True)]
        low, high = quartiles(paired)
        made[name] = round(statistics.median(a) / statistics.median(b), 3)
        made[f"{name}_quartiles"] = [round(low, 3), round(high, 3)]
    return made


class Peak:
    """Context that measures the peak resident size of this process in bytes, from the kernel."""

    bytes = 0

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        return self

    def __exit__(self, *_) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        self.bytes = 1024 * next(int(x.split()[1]) for x in lines if x.startswith("VmHWM"))


def _storages() -> dict[int, int]:
    """Bytes of every tensor storage reachable from Python, by address."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        # torch.compile leaves tensors without memory behind.
        real = isinstance(thing, torch.Tensor) and not isinstance(thing, FakeTensor)
        if real and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


class MemoryTracker:
    """Peak tensor bytes of one side, including optimizer state and gradients.

    Memory between steps is that of storages made since the tracker. Memory within a step is summed
    from the allocator events that torch's profiler reports, which include temporaries of operators
    and tensors held only by autograd.
    """

    def __init__(self) -> None:
        self.before = set(_storages())

    def peak(self, step: Callable[[], Any]) -> dict[str, int]:
        """Measures one more step. The side must have run a step, so that its state exists."""
        kept = sum(n for key, n in _storages().items() if key not in self.before)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            step()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = highest = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            highest = max(highest, live)
        return {"peak_bytes": kept + highest, "kept_bytes": kept, "step_bytes": highest}

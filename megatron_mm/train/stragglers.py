"""Slow ranks by name. In a step every rank waits for the slowest, so the times of steps are alike
everywhere and do not say whose fault they are. Every `EVERY` steps each rank therefore times the
same work by itself, without communication; a rank that is slow twice in a row is named.
"""

from __future__ import annotations

import logging
import socket
import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_mm import platform
from megatron_mm.parallel.agreement import everyone
from megatron_mm.parallel.groups import Groups

logger = logging.getLogger(__name__)

EVERY = 50  # steps between two looks
FACTOR = 1.5  # times the median; clocks of healthy GPUs of a kind differ by a tenth
PRODUCTS = 50
SIZES = {"cuda": 4096, "cpu": 256}  # of a product, which takes a millisecond or less
METRIC = "perf/slowest_rank"  # its time over the median


class Stragglers:
    """The looks of this rank. Every rank of the job makes one, before its first step."""

    def __init__(self, groups: Groups):
        self._groups = groups
        self._slow: set[int] = set()  # at the last look
        self._named: set[int] = set()

    def look(self, iteration: int) -> dict[str, float]:
        """Compares the ranks if it is time to; names those that are slow, and those that are no
        longer. Every rank calls it after every step. The host waits for the device.

        Returns:
            The metric of a look; nothing between two.
        """
        if iteration % EVERY or self._groups.world.size() < 2:
            return {}
        seconds = [each[0] for each in everyone([_seconds(platform.device())])]
        median = statistics.median_low(seconds)
        slow = slower(seconds)
        named, gone = (slow & self._slow) - self._named, self._named - slow
        if named or gone:
            self._tell(iteration, named, gone, [value / median for value in seconds])
        self._slow, self._named = slow, (self._named | named) - gone
        return {METRIC: max(seconds) / median}

    def _tell(
        self, iteration: int, named: set[int], gone: set[int], times: Sequence[float]
    ) -> None:
        hosts: list = [None] * self._groups.world.size()
        dist.all_gather_object(hosts, socket.gethostname(), group=self._groups.world)
        for rank in sorted(named):
            logger.warning(
                "rank %d on %s is slow: at step %d it takes %.1f times as long as most ranks for "
                "the same product, and all wait for it; see whether its machine is hot or shared",
                *(rank, hosts[rank], iteration, times[rank]),
            )
        for rank in sorted(gone):
            logger.info("rank %d on %s is no longer slow", rank, hosts[rank])


def slower(seconds: Sequence[float]) -> set[int]:
    """Returns the ranks that take more than `FACTOR` times the median; of two ranks, than `FACTOR`
    times the other."""
    median = statistics.median_low(seconds)
    return {rank for rank, value in enumerate(seconds) if value > FACTOR * median}


def _seconds(device: torch.device) -> float:
    """Returns the time of some products and of a pass over each of their results, on the otherwise
    idle device. Not a median of them: a rank that stands still now and then is slow."""
    size = SIZES.get(device.type, 64)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    held = torch.full((size, size), 1 / size, dtype=dtype, device=device)
    begin = 0.0
    for number in range(PRODUCTS + 1):
        (held @ held).add_(1)
        if not number:  # the first one warms up
            _wait(device)
            begin = time.perf_counter()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream().synchronize()

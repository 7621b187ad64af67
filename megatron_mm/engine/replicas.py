"""Copies of one parameter on several ranks, compared bit by bit.

Data-, tensor-, context- and expert-parallel ranks hold copies of a block if the block has the same
name, place and shape. Copies start equal and take equal updates, so any difference is a fault: of a
memory, of a kernel, of a collective. Each rank sends 8 bytes for each of its blocks.
"""

from __future__ import annotations

import hashlib
import socket
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_mm import platform
from megatron_mm.engine.engine import Engine
from megatron_mm.errors import DivergedError
from megatron_mm.parallel.agreement import everyones, largest
from megatron_mm.parallel.param_layout import ParamLayout, layouts

CHUNK = 1 << 22  # words of 8 bytes that are mixed at a time: enough to fill a GPU
CPU_CHUNK = 1 << 15  # on the CPU: they stay in its cache, which is three times as fast
ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio, as int64
NONE = 0  # the key of no block


class Odd(NamedTuple):
    """Copies of a block that differ.

    Attributes:
        ranks: those that differ from most others; all of them where no majority agrees.
        others: the ranks that agree; empty if it cannot be told which copy is right.
    """

    key: int
    ranks: list[int]
    others: list[int]


class Replicas:
    """The blocks of this rank. Every rank of the job makes one."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._keys = {key_of(name, layout): name for name, _, layout in layouts(*engine.modules)}
        self._size = largest([len(self._keys)])[0]
        self._keys_WP = everyones(self._padded(torch.tensor([*self._keys], dtype=torch.int64)))

    def check(self, iteration: int) -> None:
        """Compares all copies. Every rank calls it. The host waits for the device once.

        Raises:
            DivergedError: on every rank, if any two copies differ.
        """
        digests = [digest(layout.held(p.data)) for _, p, layout in layouts(*self._engine.modules)]
        digests_WP = everyones(self._padded(torch.stack(digests)))
        odd = odd_copies(self._keys_WP, digests_WP)
        if odd is None:
            return
        notes: list = [None] * dist.get_world_size()
        mine = (self._keys.get(odd.key), socket.gethostname())
        dist.all_gather_object(notes, mine, group=self._engine.groups.world)
        raise DivergedError(
            _text(odd, [note[0] for note in notes], [n[1] for n in notes], iteration)
        )

    def _padded(self, values: torch.Tensor) -> torch.Tensor:
        values = platform.moved(values, platform.device())
        return torch.nn.functional.pad(values, (0, self._size - len(values)), value=NONE)


def key_of(name: str, layout: ParamLayout) -> int:
    """Returns a number that blocks have in common if they are copies of each other."""
    text = f"{name} {layout.offset} {layout.held_shape} {layout.global_shape}"
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
    return number or 1


@torch.no_grad()
def digest(tensor: torch.Tensor) -> torch.Tensor:
    """Returns an int64 scalar on the tensor's device: its bits in words of 8 bytes, each mixed with
    its place, summed modulo 2^64. The mixing is one to one, so a change of one word always changes
    the sum; changes of several cancel out with a probability of about 2^-64."""
    raw = tensor.detach().reshape(-1).view(torch.uint8)
    if raw.storage_offset() % 8:
        raw = raw.clone()
    whole = len(raw) // 8 * 8
    words, rest = raw[:whole].view(torch.int64), raw[whole:].long()
    total, begin = torch.zeros((), dtype=torch.int64, device=raw.device), 0
    chunk = CPU_CHUNK if raw.device.type == "cpu" else CHUNK
    for part in (*words.split(chunk), rest):
        mixed = torch.arange(begin, begin + len(part), dtype=torch.int64, device=raw.device)
        mixed.mul_(ODD).add_(part)
        for _ in range(2):  # high bits reach low ones, and then all; the sign is not copied
            mixed.mul_(ODD)
            mixed ^= (mixed >> 31) & ((1 << 33) - 1)
        total += mixed.mul_(ODD).sum()
        begin += len(part)
    return total


def odd_copies(keys_WP: torch.Tensor, digests_WP: torch.Tensor) -> Odd | None:
    """Returns the first block whose copies differ; None if all agree.

    Args:
        keys_WP: of each rank's blocks, padded with `NONE`.
        digests_WP: of the same blocks.
    """
    keys, place = torch.unique(keys_WP.flatten(), return_inverse=True)
    digests = digests_WP.flatten()
    low, high = (
        torch.zeros_like(keys).scatter_reduce(0, place, digests, how, include_self=False)
        for how in ("amin", "amax")
    )
    wrong = keys[(low != high) & (keys != NONE)].tolist()
    if not wrong:
        return None
    # The first in the order of the first rank that has one of them.
    key = next(key for key in keys_WP.flatten().tolist() if key in set(wrong))
    at = (keys_WP == key).nonzero()
    found = {int(rank): int(digests_WP[rank, n]) for rank, n in at}
    (common, count), *_ = Counter(found.values()).most_common()
    if 2 * count <= len(found):
        return Odd(key, sorted(found), [])
    others = [rank for rank, value in found.items() if value == common]
    return Odd(key, [rank for rank in found if rank not in others], others)


def _text(odd: Odd, names: Sequence[str | None], hosts: Sequence[str], iteration: int) -> str:
    name = next(name for name in names if name is not None)

    def said(ranks: list[int]) -> str:
        shown = [f"rank {rank} on {hosts[rank]}" for rank in ranks[:4]]
        return ", ".join(shown) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")

    if odd.others:
        what = f"{said(odd.ranks)} holds another value than {said(odd.others)}"
    else:
        what = f"{said(odd.ranks)} hold different values, and no majority tells which is right"
    return (
        f"copies of parameter {name} differ at iteration {iteration}: {what}; nothing was saved: "
        "test the memory of these machines, and resume from the last checkpoint"
    )

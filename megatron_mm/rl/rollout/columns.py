"""The columns of a round's rows, over all replicas."""

from __future__ import annotations

from collections.abc import Set

import torch.distributed as dist

from megatron_mm.parallel.agreement import largest
from megatron_mm.parallel.groups import Groups


class Columns:
    """Names that any row has had, the same on every rank. They travel as texts only in a round that
    brings a new one."""

    def __init__(self) -> None:
        self._known: list[str] = []

    def of_round(self, groups: Groups, mine: Set[str]) -> list[str]:
        """Returns the names that any row of the round has, on whatever replica. Every rank of the
        job calls it.

        Args:
            mine: those of this replica's rows; empty on ranks that do not read.
        """
        new, *there = largest([not mine <= {*self._known}, *(key in mine for key in self._known)])
        if not new:
            return [key for key, held in zip(self._known, there, strict=True) if held]
        parts: list = [None] * groups.world.size()
        dist.all_gather_object(parts, mine, group=groups.world)
        found = sorted(set().union(*parts))
        self._known = sorted({*self._known, *found})
        return found

"""The columns of all rows so far, over all replicas."""

from __future__ import annotations

from collections.abc import Iterable, Set

import torch.distributed as dist

from megatron_mm.parallel.agreement import largest
from megatron_mm.parallel.groups import Groups


class Columns:
    """Names that any row has had, the same on every rank. They travel as texts only in a round that
    brings a new one."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        """
        Args:
            names: that rows are known to have, whichever a round draws.
        """
        self._known: list[str] = []  # the same on every rank
        self._more = {*names}

    @property
    def names(self) -> list[str]:
        """All names so far, for a checkpoint."""
        return sorted({*self._known, *self._more})

    def expect(self, names: Iterable[str]) -> None:
        """Adds names that rows have had before, from a checkpoint."""
        self._more |= {*names}

    def with_round(self, groups: Groups, mine: Set[str]) -> list[str]:
        """Returns the names that any row has had, on whatever replica, this round's too. So a
        reward's columns do not depend on the other rows of a round. Every rank of the job calls it.

        Args:
            mine: those of this replica's rows; empty on ranks that do not read.
        """
        mine = {*mine, *self._more}
        (new,) = largest([not mine <= {*self._known}])
        if new:
            parts: list = [None] * groups.world.size()
            dist.all_gather_object(parts, mine, group=groups.world)
            self._known = sorted({*self._known}.union(*parts))
        return self._known

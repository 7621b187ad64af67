"""The metrics' totals of all ranks, each step in one gather of fixed size.

Which names there are and of what kind is told as objects: by the first step, and by a later one
that brings a new name. From then on a step sends three numbers for each name.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_mm.parallel.agreement import everyone
from megatron_mm.report.metrics import Kind, Total

type Ranks = list[dict[str, Total]]

ABSENT = (0.0, 0.0, 0.0)  # a name that this rank added nothing to


class KnownTotals:
    """Names and kinds that all ranks know, in the same order."""

    def __init__(self) -> None:
        self.kinds: dict[str, Kind] = {}

    def gather(self, mine: Mapping[str, Total], wrong: bool = False) -> Ranks | None:
        """Returns the totals of every rank; None on every rank if any has something `wrong` or a
        total that is not known yet: then objects tell. Every rank calls it."""
        new = any(self.kinds.get(name) != total.kind for name, total in mine.items())
        row = [float(wrong or new)]
        for name in self.kinds:
            row += (1.0, *mine[name][1:]) if name in mine and not new else ABSENT
        rows = everyone(row)
        if any(row[0] for row in rows):
            return None
        found = []
        for _, *numbers in rows:
            triples = zip(*[iter(numbers)] * 3, strict=True)
            named = zip(self.kinds.items(), triples, strict=True)
            found.append({n: Total(kind, *pair) for (n, kind), (held, *pair) in named if held})
        return found

    def learn(self, ranks: Ranks) -> None:
        """Takes in the names of totals that every rank has."""
        for totals in ranks:
            self.kinds |= {name: total.kind for name, total in totals.items()}

"""Numbers that anyone adds to a step: an objective, a layer, a loop.

    context.metrics.mean("moe/chosen_logit", logits.max(), weight=len(logits))

A number stays where it is, on its device, until the step ends. Then the numbers of all microbatches
and ranks meet in one exchange (`own_totals` here, `reduced` on what every rank has). A name tells
its group: `train/`, `valid/`, `moe/`, `rollout/`, `perf/`, `checkpoint/`; names that TRL or verl
have are theirs.

Which ranks may add: a mean may be added by every rank that has a part of it, or by all ranks that
have the same, since its weights are summed, too. So may a maximum. A sum and a term of the loss are
added up over all ranks: each part must come from one rank. A pipeline stage that has nothing adds
nothing. What an objective adds counts once for each replica and context-parallel rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch

type Number = float | torch.Tensor
Kind = Literal["mean", "sum", "max", "term"]


class Entry(NamedTuple):
    """One addition: numerator and denominator of a mean, else a value and 0.

    Attributes:
        vital: a value that is not finite ends the run.
    """

    name: str
    kind: Kind
    value: Number
    weight: Number
    vital: bool


class Metrics:
    """The numbers of one microbatch, or of the loop between two steps, on one rank.

    Args:
        vital: of what is added here, anything that is not finite ends the run.
    """

    def __init__(self, vital: bool = False, entries: list[Entry] | None = None):
        self.vital = vital
        self.entries: list[Entry] = [] if entries is None else entries

    def mean(self, name: str, value: Number, weight: Number = 1.0) -> None:
        """Adds a mean of `weight` things; the metric is the mean of all of them."""
        self.ratio(name, value * weight, weight)

    def ratio(self, name: str, total: Number, count: Number) -> None:
        """Adds a sum over `count` things; the metric is the sum of totals over that of counts."""
        self._add(name, "mean", total, count)

    def sum(self, name: str, value: Number) -> None:
        """Adds to a sum over microbatches and ranks."""
        self._add(name, "sum", value)

    def max(self, name: str, value: Number) -> None:
        """Adds to a maximum over microbatches and ranks."""
        self._add(name, "max", value)

    def loss_term(self, name: str, value: Number) -> None:
        """Adds to a part of the loss in the loss's own unit: it is divided by the number that the
        loss is divided by."""
        self._add(name, "term", value)

    def for_objective(self) -> Metrics:
        """The same numbers; what is added through it must be finite."""
        return Metrics(vital=True, entries=self.entries)

    def pair(self, name: str) -> torch.Tensor:
        """fp64 [2], on the CPU: the total and the weight that were added here under a name; zeros
        if nothing was."""
        found = torch.zeros(2, dtype=torch.float64)
        for entry in self.entries:
            if entry.name == name:
                found += torch.tensor([entry.value, entry.weight], dtype=torch.float64)
        return found

    def _add(self, name: str, kind: Kind, value: Number, weight: Number = 0.0) -> None:
        entry = Entry(name, kind, _detached(value), _detached(weight), self.vital)
        self.entries.append(entry)


class _Muted(Metrics):
    """Takes numbers and keeps none: passes without a loss, repeated passes, ranks that hold the
    same as another."""

    def _add(self, name: str, kind: Kind, value: Number, weight: Number = 0.0) -> None:
        pass

    def for_objective(self) -> Metrics:
        return self


MUTED = _Muted()
DIVISOR = "train/loss_divisor"  # what the loss and its terms are divided by; not logged


class Total(NamedTuple):
    """The numbers that one rank added under one name."""

    kind: Kind
    value: float
    weight: float


class NotFinite(NamedTuple):
    """A vital number that is not finite, and which part it was added to."""

    name: str
    value: float
    part: int


def own_totals(parts: Sequence[Metrics]) -> tuple[dict[str, Total], NotFinite | None]:
    """This rank's totals by name, in the order in which numbers were added, and the first vital one
    that is not finite. Numbers are fetched from the device at once.

    Raises:
        ValueError: if a name is used for two kinds of metrics.
    """
    entries = [entry for part in parts for entry in part.entries]
    numbers = iter(_fetched([n for e in entries for n in (e.value, e.weight)]))
    totals: dict[str, Total] = {}
    problem = None
    for index, part in enumerate(parts):
        for entry in part.entries:
            value, weight = next(numbers), next(numbers)
            if entry.vital and problem is None and not math.isfinite(value):
                problem = NotFinite(entry.name, value, index)
            _count(totals, entry.name, Total(entry.kind, value, weight))
    return totals, problem


def reduced(ranks: Sequence[Mapping[str, Total]]) -> dict[str, float]:
    """The metrics of a step from the totals of every rank. A mean of nothing is 0.

    Raises:
        ValueError: if a name is used for two kinds of metrics.
    """
    totals: dict[str, Total] = {}
    for rank in ranks:
        for name, total in rank.items():
            _count(totals, name, total)
    divisor = totals.pop(DIVISOR).value if DIVISOR in totals else 0.0
    found = {}
    for name, (kind, value, weight) in totals.items():
        below = {"mean": weight, "term": divisor}.get(kind)
        found[name] = value if not below else value / below
    return found


def _count(totals: dict[str, Total], name: str, new: Total) -> None:
    old = totals.get(name)
    if old is None:
        totals[name] = Total(new.kind, 0.0 + new.value, 0.0 + new.weight)
        return
    if old.kind != new.kind:
        raise ValueError(f"metric {name} is a {old.kind} and a {new.kind}; use two names")
    if new.kind == "max":
        totals[name] = new if new.value > old.value else old
    else:
        totals[name] = Total(new.kind, old.value + new.value, old.weight + new.weight)


def _detached(number: Number) -> Number:
    return number.detach() if isinstance(number, torch.Tensor) else float(number)


def _fetched(numbers: Sequence[Number]) -> list[float]:
    """Each as fp64, with one transfer from each device."""
    found = [0.0 if isinstance(n, torch.Tensor) else n for n in numbers]
    by_device: dict[torch.device, dict[int, torch.Tensor]] = {}
    for index, number in enumerate(numbers):
        if isinstance(number, torch.Tensor):
            by_device.setdefault(number.device, {})[index] = number
    for held in by_device.values():
        stacked = torch.stack([number.reshape(()).double() for number in held.values()])
        for index, value in zip(held, stacked.tolist(), strict=True):
            found[index] = value
    return found

"""What a fake GPU counts: kernels launched, and times that the host waited for it.

Each event knows its operator, the line of code that caused it, and the part of the model that ran
(`Recorder.labelled`). Backward, a kernel belongs to the part in whose forward pass its autograd
node was made: nodes are numbered in the order in which they are made.
"""

from __future__ import annotations

import functools
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
NO_LABEL = "other"
PARAMETERS = "parameters"  # label of what runs where a gradient reaches its parameter
CALLERS = 3  # lines of code that name a site, the innermost first
# Frames that are never the cause: torch's, ours, and Python's own.
PASSED_OVER = ("/torch/", "/tools/fake_gpu/", "<frozen", "/contextlib.py", "/functools.py")


class Event(NamedTuple):
    """What happened, where.

    Attributes:
        what: an operator; for a wait, why the host waited; for a remark, a text.
        label: the part of the model.
        backward: in a backward pass; a pass that is repeated there counts as forward.
        site: lines of code, the innermost first: "model/stack.py:61 < engine/engine.py:130".
    """

    what: str
    label: str
    backward: bool
    site: str


class Events(Counter[Event]):
    """How often each event happened. `total()` is Counter's."""

    def by(self, *fields: str) -> Counter:
        """Returns totals by one field of `Event`, or by a tuple of several."""
        found: Counter = Counter()
        for event, times in self.items():
            values = tuple(getattr(event, name) for name in fields)
            found[values if len(fields) > 1 else values[0]] += times
        return found

    def of(self, **wanted: object) -> Events:
        """Returns the events whose fields have these values."""
        return Events(
            {
                event: times
                for event, times in self.items()
                if all(getattr(event, name) == value for name, value in wanted.items())
            }
        )

    def less(self, other: Events) -> Events:
        """Returns these events without those of `other`; what `other` has more of is left out."""
        return Events({e: n - other[e] for e, n in self.items() if n > other[e]})


@dataclass
class Counts:
    """
    Attributes:
        launches: kernels. One for each operator that computes or copies; views and allocations
            launch none, a collective is one.
        waits: times the host stood still until the GPU had caught up.
        remarks: what is no fault by itself: copies from pageable memory, CPU scalars as operands.
    """

    launches: Events = field(default_factory=Events)
    waits: Events = field(default_factory=Events)
    remarks: Events = field(default_factory=Events)

    def less(self, other: Counts) -> Counts:
        """Returns what these counts have more than `other`, kind by kind."""
        return Counts(
            self.launches.less(other.launches),
            self.waits.less(other.waits),
            self.remarks.less(other.remarks),
        )

    def copy(self) -> Counts:
        return Counts(*(Events(each) for each in (self.launches, self.waits, self.remarks)))

    def report(self, most: int = 40) -> str:
        """Returns the totals and the most frequent events, as text for people."""
        lines = [f"{self.launches.total()} kernels launched, {self.waits.total()} host waits"]
        for title, events, fields in (
            ("launches by part", self.launches, ("label", "backward")),
            ("waits", self.waits, ("what", "label", "site")),
            ("remarks", self.remarks, ("what", "site")),
            ("launches by operator", self.launches, ("what",)),
        ):
            lines.append(f"--- {title}")
            lines += _lines(events.by(*fields).most_common(most))
        return "\n".join(lines)


def _lines(rows: Iterable[tuple[object, int]]) -> Iterator[str]:
    for key, times in rows:
        values = key if isinstance(key, tuple) else (key,)
        words = ["backward" if v is True else "" if v is False else str(v) for v in values]
        yield f"{times:8d}  {'  '.join(filter(None, words))}"


class Recorder:
    """Writes down events with the part of the model and the line of code that cause them."""

    def __init__(self) -> None:
        self.counts = Counts()
        # (label, number of the autograd node that runs where it was entered, -1 outside backward)
        self._labels: list[tuple[str, int]] = []
        # From node `_first[i]` on, nodes were made under `_label_from[i]`.
        self._first: list[int] = [0]
        self._label_from: list[str] = [NO_LABEL]

    def launch(self, operator: str) -> None:
        self.counts.launches[self._event(operator)] += 1

    def wait(self, reason: str) -> None:
        self.counts.waits[self._event(reason)] += 1

    def remark(self, text: str) -> None:
        self.counts.remarks[self._event(text)] += 1

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Inside, events belong to `label`, and so do those of the backward pass of what runs
        inside."""
        self._labels.append((label, _node()))
        self._boundary(label)
        try:
            yield
        finally:
            self._labels.pop()
            self._boundary(self._labels[-1][0] if self._labels else NO_LABEL)

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        """Yields counts that are filled, at the end of the context, with what happened inside."""
        before, found = self.counts.copy(), Counts()
        try:
            yield found
        finally:
            new = self.counts.less(before)
            found.launches, found.waits, found.remarks = new.launches, new.waits, new.remarks

    def _event(self, what: str) -> Event:
        node = _node()
        top, entered = self._labels[-1] if self._labels else (NO_LABEL, -1)
        if node == entered:
            return Event(what, top, False, call_site())
        return Event(what, self._label_of(node), True, call_site())

    def _boundary(self, label: str) -> None:
        following = torch._C._autograd._get_sequence_nr()
        if self._first[-1] == following:
            self._label_from[-1] = label
        else:
            self._first.append(following)
            self._label_from.append(label)

    def _label_of(self, node: int) -> str:
        if node >= 2**63:  # autograd's number for nodes that only add to a parameter's gradient
            return PARAMETERS
        return self._label_from[bisect_right(self._first, node) - 1]


def _node() -> int:
    """The number of the autograd node that runs; -1 outside a backward pass."""
    node = torch._C._current_autograd_node()
    return -1 if node is None else node._sequence_nr()


@functools.cache
def _shown(path: str) -> str | None:
    """A file's path as sites show it; None for files that are passed over."""
    if any(part in path for part in PASSED_OVER):
        return None
    return path.rpartition("site-packages/")[2].removeprefix(f"{ROOT}/")


def call_site() -> str:
    """Returns the innermost lines of code that are neither torch's nor the fake GPU's."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < CALLERS:
        shown = _shown(frame.f_code.co_filename)
        if shown is not None:
            found.append(f"{shown}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found)

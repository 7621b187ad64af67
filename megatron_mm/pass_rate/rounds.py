"""Rounds: rows of a file, a fixed number at a time, on all replicas; what they give is appended by
the first rank.

Rows of a round are the same whenever it is run, so a command that was ended goes on with the round
that it lost and makes the same file. What lies in a round is not the layout's business either.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_mm.cli import EVERY_RANK
from megatron_mm.engine.feed import raise_together
from megatron_mm.errors import DataError
from megatron_mm.parallel.groups import Groups
from megatron_mm.pass_rate.output import Growing, Tally, writing

logger = logging.getLogger(__name__)


@dataclass
class Made:
    """The output of a replica for its rows of a round; empty on ranks that do not read.

    Attributes:
        lines: by row, then by place within it.
        files: by their path below the output's folder.
        sums, columns: to be tallied.
    """

    lines: dict[tuple[int, int], str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    sums: Counter = field(default_factory=Counter)
    columns: set[str] = field(default_factory=set)


def on_first_rank[T](groups: Groups, make: Callable[[], T]) -> T:
    """Returns what `make` returns on the first rank, on every rank. Every rank calls it.

    Raises:
        DataError: on every rank, as `make`.
    """
    made: list[T | None] = [None]
    error = None
    if dist.get_rank() == 0:
        try:
            made[0] = make()
        except DataError as problem:
            error = problem
    raise_together(groups, error)
    dist.broadcast_object_list(made, src=0, group=groups.world)
    return made[0]  # type: ignore[return-value]


def each_row(
    groups: Groups, made: Made, jobs: Iterable[Callable[[], None]], skip_bad: bool
) -> None:
    """Runs a job for each row, on the replica's reader. Every rank of the job calls it.

    Raises:
        DataError: on every rank, as a job, unless `skip_bad`: the row is then counted as `skipped`.
    """
    error = None
    for job in jobs if groups.is_reader else ():
        try:
            job()
        except DataError as problem:
            if not skip_bad:
                error = problem
                break
            made.sums["skipped"] += 1
            logger.info("left out: %s", problem, extra=EVERY_RANK)
    raise_together(groups, error)


def run_rounds(
    groups: Groups,
    out: Path,
    key: str,
    rows: int,
    per_round: int,
    work: Callable[[list[int], Tally], Made],
    say: Callable[[Tally], str],
) -> Tally:
    """Runs the rounds that `out` lacks. Every rank of the job calls it.

    Args:
        key: digest of what the output depends on.
        rows: of the file; per_round: those of a round, on all replicas together.
        work: makes something of this replica's rows; every rank calls it, with the same numbers as
            others of its replica, and with the tally of the rounds before.
        say: a line about what is done so far.
    Returns:
        the tally of the whole file.
    Raises:
        DataError: on every rank, as `work`, or for a file that cannot be written.
    """
    file: Growing | None = None

    def begin() -> Tally:
        nonlocal file
        file = Growing(out, f"{key} {per_round}")
        return file.tally

    def end() -> None:
        assert file is not None  # of the first rank
        file.finish()

    try:
        tally = on_first_rank(groups, begin)
        if tally.rows:
            logger.info("going on behind row %d of %d", tally.rows, rows)
        rank, size, began, first = groups.pg.dp.rank(), groups.pg.dp.size(), time.monotonic(), None
        while tally.rows < rows:
            first = tally.rows if first is None else first
            numbers = range(tally.rows, min(tally.rows + per_round, rows))
            made = work([*numbers[rank::size]], tally)
            parts: list = [None] * groups.world.size()
            mine = made if groups.is_reader else None
            dist.gather_object(mine, parts if dist.get_rank() == 0 else None, group=groups.world)
            tally = on_first_rank(groups, partial(_append, file, len(numbers), parts))
            speed = (tally.rows - first) / (time.monotonic() - began)
            logger.info("row %d of %d: %s | %.3g rows/s", tally.rows, rows, say(tally), speed)
        on_first_rank(groups, end)
        return tally
    finally:
        if file is not None:
            file.close()


def _append(file: Growing | None, rows: int, parts: list[Made | None]) -> Tally:
    """Writes what the replicas made, in the order of rows."""
    assert file is not None  # of the first rank
    lines: dict[tuple[int, int], str] = {}
    sums: Counter = Counter()
    columns: set[str] = set()
    for part in parts:
        if part is None:
            continue
        lines |= part.lines
        sums.update(part.sums)
        columns |= part.columns
        for name, content in part.files.items():
            path = file.path.parent / name
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    file.append([lines[place] for place in sorted(lines)], rows, sums, columns)
    return file.tally

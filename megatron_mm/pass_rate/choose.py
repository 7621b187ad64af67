"""Chooses rows by their pass rate: those of a range, and tiers for the phases of a curriculum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_mm.errors import ConfigError, DataError
from megatron_mm.pass_rate.output import write_new
from megatron_mm.pass_rate.rated import Rated, check_images_beside, line_of, read_rated


def keep(data: Path, out: Path, low: float, high: float) -> str:
    """Writes the rows whose accuracy is from `low` to `high`, both inclusive, and says how many.

    Raises:
        ConfigError: there is no such range.
        DataError: for a file that cannot be read or written, a row that is not rated, or no row.
    """
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"--between is {low:g} {high:g}; allowed: two numbers, 0 to 1, ascending")
    lines: list[str] = []
    count: Counter = Counter()
    for row in read_rated(data):
        fate = "unjudged" if row.accuracy is None else "easier" if row.accuracy > high else "harder"
        if row.accuracy is not None and low <= row.accuracy <= high:
            fate = "kept"
            lines.append(_line(row, data, out))
        count[fate] += 1
    _check_some(lines, data, f"an accuracy from {low:g} to {high:g}")
    write_new({out: lines})
    return (
        f"{out}: {count['kept']} of {count.total()} rows; {count['harder']} harder, "
        f"{count['easier']} easier, {count['unjudged']} without a verdict"
    )


def tiers(data: Path, out: Path, edges: Sequence[float]) -> str:
    """Splits rows at some accuracies into files, the easiest first: OUT's name with _1, _2 and so
    on. A row on an edge is in the easier one. Says what to write into a run's file.

    Raises:
        ConfigError: edges are not ascending.
        DataError: for a file that cannot be read or written, a row that is not rated, or no row.
    """
    if not edges or [*edges] != sorted({*edges}) or edges[0] <= 0 or edges[-1] > 1:
        given = " ".join(f"{edge:g}" for edge in edges)
        raise ConfigError(f"--edges is {given}; allowed: numbers above 0 up to 1, ascending")
    found: list[list[str]] = [[] for _ in range(len(edges) + 1)]
    left = 0
    for row in read_rated(data):
        if row.accuracy is None:
            left += 1
            continue
        above = sum(row.accuracy >= edge for edge in edges)
        found[len(edges) - above].append(_line(row, data, out))
    _check_some([line for lines in found for line in lines], data, "an accuracy")
    files = {
        out.with_name(f"{out.stem}_{n}{out.suffix}"): lines
        for n, lines in enumerate(found, start=1)
        if lines  # an empty file is no data
    }
    write_new(files)
    said = [
        f"{len(files)} files, {left} rows without a verdict left out; for a run:",
        "train_data:",
    ]
    for number, (path, lines) in enumerate(files.items(), start=1):
        said.append(f"- path: {path}")
        if number < len(files):  # the last one is repeated as long as the run goes on
            said.append(f"  samples: {len(lines)}")
    return "\n".join(said)


def _line(row: Rated, data: Path, out: Path) -> str:
    check_images_beside(row.row, row.where, data.parent, out)
    return line_of(row.row, row.where)


def _check_some(lines: Sequence[str], data: Path, what: str) -> None:
    if not lines:
        raise DataError(f"{data}: 0 rows have {what}; choose another range")

"""Chooses rows by their pass rate: those of a range, and tiers for the phases of a curriculum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_mm.errors import ConfigError, DataError
from megatron_mm.pass_rate.output import NewFiles
from megatron_mm.pass_rate.rated import Rated, check_images_beside, line_of, read_rated


def keep(data: Path, out: Path, low: float, high: float) -> str:
    """Writes the rows whose accuracy is from `low` to `high`, both inclusive, and says how many.

    Raises:
        ConfigError: there is no such range.
        DataError: for a file that cannot be read or written, a row that is not rated, or no row.
    """
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"--between is {low:g} {high:g}; allowed: two numbers, 0 to 1, ascending")
    count: Counter = Counter()
    with NewFiles([out]) as files:
        for row in read_rated(data):
            fate = "unjudged"
            if row.accuracy is not None:
                fate = "easier" if row.accuracy > high else "harder"
                if low <= row.accuracy <= high:
                    fate = "kept"
                    files.add(out, _line(row, data, out))
            count[fate] += 1
        _check_some(count["kept"], data, f"an accuracy from {low:g} to {high:g}")
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
    numbers = range(1, len(edges) + 2)
    paths = [out.with_name(f"{out.stem}_{number}{out.suffix}") for number in numbers]
    left = 0
    with NewFiles(paths) as files:
        for row in read_rated(data):
            if row.accuracy is None:
                left += 1
                continue
            above = sum(row.accuracy >= edge for edge in edges)
            files.add(paths[len(edges) - above], _line(row, data, out))
        _check_some(sum(files.lines.values()), data, "an accuracy")
    made = {path: lines for path, lines in files.lines.items() if lines}
    said = [
        f"{len(made)} files, {left} rows without a verdict left out; for a run:",
        "train_data:",
    ]
    for number, (path, lines) in enumerate(made.items(), start=1):
        said.append(f"- path: {path}")
        if number < len(made):  # the last one is repeated as long as the run goes on
            said.append(f"  samples: {lines}")
    return "\n".join(said)


def _line(row: Rated, data: Path, out: Path) -> str:
    check_images_beside(row.row, row.where, data.parent, out)
    return line_of(row.row, row.where)


def _check_some(lines: int, data: Path, what: str) -> None:
    if not lines:
        raise DataError(f"{data}: 0 rows have {what}; choose another range")

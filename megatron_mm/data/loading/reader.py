"""Reads rows and builds samples, in a worker process or in the loader itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_mm.config.settings import RunConfig
from megatron_mm.data.files.rows import RowFiles
from megatron_mm.data.sample import CACHE_BYTES, Sample, SampleBuilder, Size
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.errors import DataError, DecoderError


class Place(NamedTuple):
    """Source and row within it, both from 0."""

    source: int
    row: int


class Prompt(NamedTuple):
    """Row to be answered."""

    sample: Sample  # ends where the answer begins
    row: dict[str, Any]
    where: str  # "file:row"


# (row, "file:row", its sample) -> the skill of each position, int64 [tokens] or -1.
Labels = Callable[[dict[str, Any], str, Sample], torch.Tensor]


class Reader:
    """Builds samples from rows of `sources`. In place of a bad row's sample it returns the text of
    the DataError, so that a bad row does not affect the others. A subclass may make something else
    of a row than a sample.

    Args:
        labels: gives samples their `skill_T`; it must be one that can be pickled.
    """

    def __init__(
        self,
        run: RunConfig,
        tokenizer: Tokenizer,
        sources: Sequence[RowFiles],
        cache_bytes: int = CACHE_BYTES,
        labels: Labels | None = None,
    ) -> None:
        self.builder = SampleBuilder(run, tokenizer, cache_bytes)
        self._sources, self._labels = sources, labels
        self._most_tiles = run.data.max_pack_tiles
        self._made_from = (run, tokenizer, sources)

    def for_workers(self, number: int) -> tuple[Any, ...]:
        """Returns the arguments of `in_worker` for each of `number` processes, which together cache
        as much as one reader."""
        return (type(self), *self._made_from, CACHE_BYTES // number, self._labels)

    def where(self, place: Place) -> str:
        """Returns "file:row"."""
        file, index = self._sources[place.source].locate(place.row)
        return file.where(index)

    def describe(self, places: Sequence[Place]) -> str:
        """Names the first of `places` and counts the others, for an error in any of them."""
        if not places:
            return "no row"
        others = len(places) - 1
        return self.where(places[0]) + (f" and {others} rows with it" if others else "")

    def build(self, places: Sequence[Place]) -> list[Any]:
        """Returns what training takes from each row, a `Sample` here, or why the row is bad."""
        return [self._read(self._training, place) for place in places]

    def _training(self, row: dict[str, Any], where: str, folder: Path) -> Any:
        sample = self.builder.training(row, where, folder)
        if self._labels is not None:
            sample.skill_T = self._labels(row, where, sample)
        return sample

    def prompts(self, places: Sequence[Place]) -> list[Prompt | str]:
        return [self._read(self._prompt, place) for place in places]

    def _prompt(self, row: dict[str, Any], where: str, folder: Path) -> Prompt:
        return Prompt(self.builder.prompt(row, where, folder), row, where)

    def measure(self, places: Sequence[Place]) -> list[Size | str]:
        """Returns the cost of what `build` makes of each row, or why the row is bad."""
        return [self._read(self._packable, place) for place in places]

    def _packable(self, row: dict[str, Any], where: str, folder: Path) -> Size:
        size = self._measured(row, where, folder)
        problem = too_many_tiles(where, size.tiles, self._most_tiles)
        if problem is not None:
            raise DataError(problem)
        return size

    def _measured(self, row: dict[str, Any], where: str, folder: Path) -> Size:
        return self.builder.measure(row, where, folder)

    def _read(self, turn: Callable[..., Any], place: Place) -> Any:
        file, index = self._sources[place.source].locate(place.row)
        where = file.where(index)
        try:
            with reading(where):
                return turn(file[index], where, file.folder)
        except DataError as error:
            return str(error)


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Makes any error of the body that a row can cause a DataError that names the row."""
    try:
        yield
    except (DataError, MemoryError, DecoderError):  # named, or not caused by the row
        raise
    except Exception as error:  # of any kind: the message must name the row
        reason = " ".join(str(error).split())
        raise DataError(f"{where}: reading failed: {type(error).__name__}: {reason}") from error


def in_worker(kind: type[Reader], *arguments: Any) -> Reader:
    """Makes the reader of a worker process. One thread, since `num_workers` sets the number of
    processes."""
    torch.set_num_threads(1)
    return kind(*arguments)


def too_many_tiles(where: str, tiles: int, most: int | None) -> str | None:
    """Returns why a row has more tiles than `max_pack_tiles` allows; None if it has not."""
    if most is None or tiles <= most:
        return None
    return (
        f"{where}: {tiles} image tiles, max_pack_tiles is {most}; raise it, or lower "
        "max_num_tiles or max_image_tokens"
    )

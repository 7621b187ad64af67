"""Rows to samples, by place: what a worker process does, or the reader itself without workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_mm.config.settings import RunConfig
from megatron_mm.data.files.rows import RowFiles
from megatron_mm.data.sample import CACHE_BYTES, Sample, SampleBuilder, Size
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.errors import DataError


class Place(NamedTuple):
    source: int
    row: int


class Prompt(NamedTuple):
    """A row to be answered."""

    sample: Sample  # ends where the answer begins
    row: dict[str, Any]
    where: str  # "file:row"


class Reader:
    """Reads rows of `sources`. What is wrong with a row comes back in its place, as the text of
    a DataError, so that one bad row among several costs only itself."""

    def __init__(
        self,
        run: RunConfig,
        tokenizer: Tokenizer,
        sources: Sequence[RowFiles],
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.builder = SampleBuilder(run, tokenizer, cache_bytes)
        self._sources = sources
        self._made_from = (run, tokenizer, sources)

    def for_workers(self, number: int) -> tuple[Any, ...]:
        """The arguments of `in_worker` in each of `number` processes; together they cache as
        much as one reader does."""
        return (*self._made_from, CACHE_BYTES // number)

    def where(self, place: Place) -> str:
        """`file:row`."""
        file, index = self._sources[place.source].locate(place.row)
        return file.where(index)

    def describe(self, places: Sequence[Place]) -> str:
        """The first of `places`, for an error that may be due to any of them."""
        if not places:
            return "no row"
        others = len(places) - 1
        return self.where(places[0]) + (f" and {others} rows with it" if others else "")

    def build(self, places: Sequence[Place]) -> list[Sample | str]:
        return [self._read(self.builder.training, place) for place in places]

    def prompts(self, places: Sequence[Place]) -> list[Prompt | str]:
        return [self._read(self._prompt, place) for place in places]

    def _prompt(self, row: dict[str, Any], where: str, folder: Path) -> Prompt:
        return Prompt(self.builder.prompt(row, where, folder), row, where)

    def measure(self, places: Sequence[Place]) -> list[Size | str]:
        return [self._read(self.builder.measure, place) for place in places]

    def _read(self, turn: Callable[..., Any], place: Place) -> Any:
        file, index = self._sources[place.source].locate(place.row)
        where = file.where(index)
        try:
            return turn(file[index], where, file.folder)
        except DataError as error:
            return str(error)
        except MemoryError:  # no fault of the row
            raise
        except Exception as error:  # whatever it is, the row that it came from must be told
            reason = " ".join(str(error).split())
            return f"{where}: reading failed: {type(error).__name__}: {reason}"


def in_worker(*arguments: Any) -> Reader:
    """A Reader in a process of its own. One thread: there are as many workers as wanted."""
    torch.set_num_threads(1)
    return Reader(*arguments)

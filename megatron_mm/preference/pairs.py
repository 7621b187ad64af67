"""Pairs: the two samples of a row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_mm.data.sample import Sample, SampleBuilder, Size
from megatron_mm.errors import DataError
from megatron_mm.preference.forms import rows_of_sides


class Pair(NamedTuple):
    """The sides of a row. They share the objects of their images."""

    chosen: Sample
    rejected: Sample


def build_pair(builder: SampleBuilder, row: dict[str, Any], where: str, folder: Path) -> Pair:
    """Builds both samples of a row. Raises DataError, also if their tokens are equal."""
    better, worse = rows_of_sides(row, where)
    chosen = builder.training(better, f"{where} (chosen)", folder)
    rejected = builder.beside(chosen, worse, f"{where} (rejected)", folder)
    if torch.equal(chosen.tokens_T, rejected.tokens_T):
        raise DataError(
            f"{where}: chosen and rejected are equal, {len(chosen.tokens_T)} tokens each; drop the "
            "row"
        )
    return Pair(replace(chosen, where=where), replace(rejected, where=where))


def pair_size(builder: SampleBuilder, row: dict[str, Any], where: str, folder: Path) -> Size:
    """Returns the size of a row's pair: the tokens of both sides, the tiles of one. Raises like
    `SampleBuilder.measure`."""
    better, worse = rows_of_sides(row, where)
    chosen = builder.measure(better, f"{where} (chosen)", folder)
    rejected = builder.measure(worse, f"{where} (rejected)", folder)
    return Size(chosen.tokens + rejected.tokens, chosen.tiles)

"""Converts a folder of safetensors to a sharded checkpoint, chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mm.checkpoint.compatible import CARRIED_PREFIX
from megatron_mm.checkpoint.shards import weight_key
from megatron_mm.config import RunConfig
from megatron_mm.convert.chunked import Made, write_checkpoint
from megatron_mm.convert.folder import NOTES, HFFolder
from megatron_mm.convert.mapping import EMBEDDING, ParamMapping, StateMapping
from megatron_mm.convert.stored import CHUNK_BYTES
from megatron_mm.convert.work import nbytes, row_ranges
from megatron_mm.parallel.param_layout import ParamLayout, draw


@dataclass(frozen=True)
class Import:
    """Unit of work: a chunk of a mapped tensor, of a new parameter, or a carried tensor."""

    key: str
    bytes: int
    first: int = 0
    last: int = 0
    link: ParamMapping | None = None
    new: str | None = None
    carried: str | None = None

    @property
    def written(self) -> int:
        return self.bytes


def dtype_of(source: HFFolder, mapping: StateMapping, dtype: torch.dtype | None) -> torch.dtype:
    """Dtype of new parameters: the requested one, else that of the embedding."""
    (embedding,) = (link for link in mapping.links if link.mcore == EMBEDDING)
    return dtype or source.dtype(embedding)


def imports(
    source: HFFolder,
    mapping: StateMapping,
    parameters: Mapping[str, ParamLayout],
    dtype: torch.dtype | None,
) -> list[Import]:
    """Splits a conversion into units that ranks share."""
    found = []
    for link in mapping.links:
        size = (dtype or source.dtype(link)).itemsize
        found += _of_rows(weight_key(link.mcore), link.shape, link.counted, size, link=link)
    of_name = {link.mcore: link for link in mapping.links}
    for name in mapping.new:
        layout = parameters[name]
        copied = of_name.get(layout.source(name) or "")
        if copied is not None:
            size = (dtype or source.dtype(copied)).itemsize
            found += _of_rows(weight_key(name), copied.shape, copied.counted, size, link=copied)
            continue
        size = dtype_of(source, mapping, dtype).itemsize
        found += _of_rows(
            weight_key(name), layout.global_shape, layout.rows_drawn_alone, size, new=name
        )
    for name in mapping.carried:
        found.append(Import(CARRIED_PREFIX + name, source.tensors[name].nbytes, carried=name))
    return found


def _of_rows(key: str, shape: tuple[int, ...], counted: bool, size: int, **what) -> list[Import]:
    if not counted:
        return [Import(key, nbytes(shape, size), **what)]
    row = nbytes(shape[1:], size)
    ranges = row_ranges(shape[0], row, CHUNK_BYTES)
    return [Import(key, (last - first) * row, first, last, **what) for first, last in ranges]


def _make(
    part: Import,
    source: HFFolder,
    parameters: Mapping[str, ParamLayout],
    dtype: torch.dtype | None,
    start: torch.dtype,
    seed: int,
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Returns (the chunk, shape of the whole tensor)."""
    if part.carried is not None:
        tensor = source.read(part.carried, None, None)
        return tensor, tuple(tensor.shape)
    if part.link is not None:
        tensor = part.link.to_mcore(source.read, part.first, part.last)
        return tensor.to(dtype or tensor.dtype), part.link.shape
    name = part.new
    assert name is not None  # it is one of the three
    layout = parameters[name]
    if not layout.rows_drawn_alone:
        return draw(layout, name, seed).to(start), layout.global_shape
    rows = [draw(layout, name, seed, i) for i in range(part.first, part.last)]
    return torch.stack(rows).to(start), layout.global_shape


def convert(
    source: HFFolder,
    mapping: StateMapping,
    parameters: Mapping[str, ParamLayout],
    run: RunConfig,
    target: Path,
    group: dist.ProcessGroup,
    *,
    dtype: torch.dtype | None = None,
    quiet: bool = False,
) -> Path:
    """Writes `target/iter_0000000` and points `target/latest` to it. Every rank calls it.

    Args:
        run: model, and the layout to record; its seed draws new parameters.
        group: gloo group of all ranks.
        dtype: dtype of the model's tensors; None: as stored.

    Raises:
        CheckpointError: on every rank; partial output is removed.
    """
    work = imports(source, mapping, parameters, dtype)
    start, seed = dtype_of(source, mapping, dtype), run.training.seed

    def make(part: Import) -> Made:
        tensor, shape = _make(part, source, parameters, dtype, start, seed)
        return part.key, shape, part.first, tensor

    return write_checkpoint(
        target,
        0,
        work,
        make,
        replace(run, data=source.data),  # an export of this checkpoint reads images so
        {NOTES: source.notes},
        source.assets,
        group,
        doing=f"cannot convert {source.folder} to {target}",
        what="to megatron",
        quiet=quiet,
    )

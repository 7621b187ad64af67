"""Converts a folder of safetensors to a sharded checkpoint, chunk by chunk.

The files do not depend on the layout: a chunk is a whole tensor or one or several experts, and any
layout reads its part of any chunk. Ranks share the chunks.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

import megatron_mm
from megatron_mm.checkpoint import folders, sealed, storage
from megatron_mm.checkpoint.collective import raising_together
from megatron_mm.checkpoint.compatible import CARRIED_PREFIX
from megatron_mm.checkpoint.lock import held
from megatron_mm.checkpoint.shards import weight_key
from megatron_mm.config import RunConfig, data_parallel_size, to_dict
from megatron_mm.convert.folder import NOTES, HFFolder
from megatron_mm.convert.mapping import ParamMapping, StateMapping
from megatron_mm.convert.stored import CHUNK_BYTES, Chunk, ChunkWriter, write_index
from megatron_mm.convert.work import nbytes, progress, row_ranges, share
from megatron_mm.errors import CheckpointError, ConvertError
from megatron_mm.parallel.param_layout import ParamLayout, draw

ASSETS = "huggingface"  # folder inside a checkpoint


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


def dtype_of(source: HFFolder, mapping: StateMapping, dtype: torch.dtype | None) -> torch.dtype:
    """Dtype of new parameters: the requested one, else that of the embedding."""
    return dtype or source.tensors[mapping.links[0].names[0].replace("{expert}", "0")].dtype


def imports(
    source: HFFolder,
    mapping: StateMapping,
    parameters: Mapping[str, ParamLayout],
    dtype: torch.dtype | None,
) -> list[Import]:
    """Splits a conversion into units that ranks share."""
    found = []
    for link in mapping.links:
        name = link.names[0].replace("{expert}", "0")
        size = (dtype or source.tensors[name].dtype).itemsize
        found += _of_rows(weight_key(link.mcore), link.shape, link.counted, size, link=link)
    for name in mapping.new:
        layout = parameters[name]
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
    with held(target, group):
        work = imports(source, mapping, parameters, dtype)
        return _convert(source, mapping, parameters, work, run, target, group, dtype, quiet)


def _convert(source, mapping, parameters, work, run, target, group, dtype, quiet) -> Path:
    leader = group.rank() == 0
    final = target / folders.name_of(0)
    partial = folders.with_suffix(final, folders.PARTIAL)
    doing = f"cannot convert {source.folder} to {target}"
    drawn = [secrets.token_hex(16)]
    dist.broadcast_object_list(drawn, group=group, group_src=0)
    identity = drawn[0]
    with raising_together(group, doing):
        if leader:
            _prepare(target, partial, sum(part.bytes for part in work))
    try:
        chunks = _write(
            source, mapping, parameters, work, run, partial, group, doing, dtype, quiet, identity
        )
        with raising_together(group, doing):
            if leader:
                _finish(source, chunks, run, partial, identity)
                folders.publish(partial, final)
    except CheckpointError:
        if leader:
            with contextlib.suppress(OSError):
                shutil.rmtree(partial)
        raise
    return final


def _prepare(target: Path, partial: Path, needed: int) -> None:
    target.mkdir(parents=True, exist_ok=True)
    # A conversion killed while publishing leaves `iter_0000000` without `latest`. No run finds it
    # there, and `publish` replaces it.
    found = {path.name for path in target.iterdir() if folders.NAME.fullmatch(path.name)}
    if (target / folders.LATEST).exists() or found - {folders.name_of(0)}:
        raise ConvertError(f"{target} holds checkpoints already: nothing is overwritten")
    folders.clear_leftovers(target)
    check_space(target, needed)
    partial.mkdir()


def check_space(folder: Path, needed: int) -> None:
    """Checks free disk space.

    Raises:
        ConvertError: `needed` bytes do not fit on the disk of `folder`.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConvertError(f"{folder} has {free} bytes of disk left, {needed} are needed")


def _write(
    source, mapping, parameters, work, run, partial, group, doing, dtype, quiet, identity
) -> list[Chunk]:
    """Writes this rank's share. Returns the chunks of all ranks."""
    start, seed = dtype_of(source, mapping, dtype), run.training.seed
    mine = share(work, lambda part: part.bytes, group.rank(), group.size())
    chunks: list[Chunk] = []
    total, shown = sum(part.bytes for part in mine), group.rank() == 0 and not quiet
    with (
        raising_together(group, doing),
        ChunkWriter(partial, group.rank(), identity) as writer,
        progress(total, "to megatron", shown) as done,
    ):
        for part in mine:
            tensor, shape = _make(part, source, parameters, dtype, start, seed)
            writer.add(part.key, tensor, shape, part.first)
            done(part.bytes)
        chunks = writer.finish()
    every: list = [None] * group.size()
    dist.all_gather_object(every, chunks, group=group)
    return [chunk for written in every for chunk in written]


def _finish(
    source: HFFolder, chunks: list[Chunk], run: RunConfig, partial: Path, identity: str
) -> None:
    write_index(partial, chunks, identity)
    (partial / ASSETS).mkdir()
    checksums = {}
    for path in source.assets:
        asset = path.read_bytes()
        sealed.write_bytes(partial / ASSETS / path.name, asset)
        checksums[f"{ASSETS}/{path.name}"] = zlib.crc32(asset)
    sealed.sync_folder(partial / ASSETS)
    run = replace(run, data=source.data)  # an export of this checkpoint reads images so
    parallel = run.parallel
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    layout = {
        "tp": tp,
        "pp": pp,
        "cp": cp,
        "ep": parallel.expert_model_parallel_size,
        "expert_tp": parallel.expert_tensor_parallel_size or tp,
        "dp": data_parallel_size(run, tp * pp * cp),
    }
    content = {
        "format": folders.FORMAT,
        "megatron_mm": megatron_mm.__version__,
        "iteration": 0,
        "identity": identity,
        "layout": layout,
        "adam_step": 0,
        "scheduler": {},
        "loader": {},
        "extra": {NOTES: source.notes},
        "config": to_dict(run),
        "checksums": checksums | storage.write_format(partial),
    }
    sealed.write_json(partial / folders.RUN, content)
    sealed.sync_folder(partial)

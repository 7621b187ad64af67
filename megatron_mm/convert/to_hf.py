"""Converts a sharded checkpoint, of any layout, to a folder that transformers loads."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mm.checkpoint import folders, lock, sealed, storage
from megatron_mm.checkpoint.collective import check_same, raising_together
from megatron_mm.checkpoint.compatible import CARRIED_PREFIX, check_tensors
from megatron_mm.checkpoint.index import check_whole
from megatron_mm.checkpoint.lock import held
from megatron_mm.checkpoint.shards import weight_key
from megatron_mm.config import ModelConfig, RunConfig, run_of_checkpoint
from megatron_mm.convert import export
from megatron_mm.convert.chunked import ASSETS, check_space
from megatron_mm.convert.export_inputs import has_code
from megatron_mm.convert.folder import NOTES, equal_bits, travelling
from megatron_mm.convert.hf_writer import (
    SHARD_BYTES,
    Place,
    TensorWriter,
    create_files,
    lay_out,
    write_index,
)
from megatron_mm.convert.mapping import EMBEDDING, HEAD, ParamMapping, write_links
from megatron_mm.convert.stored import ChunkReader
from megatron_mm.convert.work import nbytes, progress, share
from megatron_mm.errors import CheckpointError, ConvertError
from megatron_mm.model.blueprint import blueprint
from megatron_mm.parallel.param_layout import ParamLayout

MOST_ASSET = 2**30  # bytes of a tokenizer's file


@dataclass
class Checkpoint:
    """Opened checkpoint.

    Attributes:
        path: folder of this checkpoint, not of several.
        carried: hf names of tensors that were carried beside the model.
        notes: `HFFolder.notes` of the folder it was converted from.
    """

    path: Path
    run: RunConfig
    iteration: int
    reader: ChunkReader
    parameters: Mapping[str, ParamLayout]
    carried: list[str]
    notes: dict[str, Any]

    @property
    def model(self) -> ModelConfig:
        return self.run.model

    @property
    def assets(self) -> list[Path]:
        """Tokenizer and processor files of the folder it was converted from, else of the tokenizer
        it was trained with."""
        own, tokenizer = self.path / ASSETS, self.run.data.tokenizer_model
        if own.is_dir():
            return travelling(own)
        return travelling(Path(tokenizer)) if tokenizer and Path(tokenizer).is_dir() else []


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads index and settings and checks them against the model. No pickle is trusted.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or of another model.
    """
    path, stored = folders.resolve(folder)
    run = run_of_checkpoint(stored["config"])
    shapes, index = storage.read_index(path, stored["checksums"], stored["identity"])
    storage.check_files(path, index)
    for file in travelling(path / ASSETS):
        name = f"{ASSETS}/{file.name}"
        sealed.read_bytes(file, stored["checksums"].get(name), MOST_ASSET)
    parameters = blueprint(run.model)
    expected = {weight_key(name): layout.global_shape for name, layout in parameters.items()}
    added = check_tensors(shapes, expected, finetune=True)
    if added:
        raise CheckpointError(f"of {len(expected)} tensors expected, {added[0]} is missing")
    check_whole(index)
    carried = [k.removeprefix(CARRIED_PREFIX) for k in shapes if k.startswith(CARRIED_PREFIX)]
    notes = stored["extra"].get(NOTES) or {}
    if type(notes) is not dict:
        raise CheckpointError(f"{path / folders.RUN} is damaged: extra.{NOTES} is no dict")
    reader = ChunkReader(path, index, stored["identity"])
    return Checkpoint(path, run, stored["iteration"], reader, parameters, carried, notes)


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the output layer was tied to the embedding and still equals it."""
    if not checkpoint.notes.get("tied"):
        return False
    read, ends = checkpoint.reader.read, [weight_key(n) for n in (EMBEDDING, HEAD)]
    ranges = checkpoint.reader.ranges(ends[0])
    return all(equal_bits(*(read(key, first, last) for key in ends)) for first, last in ranges)


@dataclass(frozen=True)
class Export:
    """Unit of work: a mapped tensor, some rows of a counted one, or a carried tensor."""

    bytes: int
    link: ParamMapping | None = None
    first: int = 0
    last: int = 0
    carried: str | None = None


def exports(checkpoint: Checkpoint, links: list[ParamMapping]) -> list[Export]:
    """Splits a conversion into units that ranks share."""
    reader, found = checkpoint.reader, []
    for link in links:
        key = weight_key(link.mcore)
        size = reader.dtype(key).itemsize
        if not link.counted:
            found.append(Export(nbytes(link.shape, size), link))
            continue
        row = nbytes(link.shape[1:], size)
        found += [Export((b - a) * row, link, a, b) for a, b in reader.ranges(key)]
    for name in checkpoint.carried:
        key = CARRIED_PREFIX + name
        found.append(Export(nbytes(reader.shape(key), reader.dtype(key).itemsize), carried=name))
    return found


def outputs(
    checkpoint: Checkpoint, links: list[ParamMapping], dtype: torch.dtype | None
) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Returns (name, shape, dtype) of every tensor to be written, in the order of reading."""
    reader, found = checkpoint.reader, []
    for link in links:
        kind = dtype or reader.dtype(weight_key(link.mcore))
        found += [(name, tuple(shape), kind) for name, shape in link.hf_tensors()]
    for name in checkpoint.carried:
        key = CARRIED_PREFIX + name
        found.append((name, reader.shape(key), reader.dtype(key)))
    return found


def convert(
    checkpoint: Checkpoint,
    target: Path,
    group: dist.ProcessGroup,
    *,
    stacked: bool = False,
    dtype: torch.dtype | None = None,
    assets: list[Path] | None = None,
    shard_bytes: int = SHARD_BYTES,
    quiet: bool = False,
) -> list[str]:
    """Writes the folder `target`, which must not exist. Every rank calls it.

    Args:
        group: gloo group of all ranks.
        stacked: write the experts of a layer as one tensor (save_original_format=False).
        dtype: dtype of the model's tensors; None: as stored.
        assets: tokenizer and processor files; None: those of the checkpoint.
        shard_bytes: size limit of a file.

    Returns:
        Lines to print.

    Raises:
        CheckpointError: on every rank; `target` was not made.
    """
    leader = group.rank() == 0
    check_same(group, checkpoint.path, checkpoint.reader.identity)
    doing = f"cannot convert {checkpoint.path} to {target}"
    target = target.absolute()  # "." has no name
    lines: list[str] = []
    with raising_together(group, doing):
        tied = is_tied(checkpoint)
        if checkpoint.notes.get("tied") and not tied:
            lines.append("the output layer is no longer the embedding: written untied")
        links = write_links(checkpoint.model, checkpoint.parameters, _spelling(checkpoint, stacked))
        links = [link for link in links if not (tied and link.mcore == HEAD)]
        written = outputs(checkpoint, links, dtype)
        places, heads, sizes = lay_out(written, shard_bytes)
        if leader:
            dtypes: Counter[torch.dtype] = Counter()
            for _, shape, kind in written:
                dtypes[kind] += math.prod(shape)
            assets = checkpoint.assets if assets is None else assets
            files = export.small_files(checkpoint, assets, tied, dtypes, lines)
            _check_absent(target)
    partial = folders.with_suffix(target, folders.PARTIAL)
    with held(partial, group):
        try:
            with raising_together(group, doing):
                if leader:
                    _prepare(target, partial, files, places, heads, sizes)
            _write(checkpoint, links, partial, places, group, doing, quiet)
            with raising_together(group, doing):
                if leader:
                    _publish(partial, target)
        except CheckpointError:
            if leader:
                with contextlib.suppress(OSError):
                    shutil.rmtree(partial)
            raise
    return lines


def _spelling(checkpoint: Checkpoint, stacked: bool) -> str:
    if checkpoint.model.vision is None:
        return "text-stacked" if stacked else "text"
    # transformers converts names on loading only for its own models, not for remote code.
    return "stacked" if stacked or has_code(checkpoint.model) else "transformers"


def _prepare(
    target: Path,
    partial: Path,
    files: dict[str, bytes],
    places: dict[str, Place],
    heads: dict[str, bytes],
    sizes: dict[str, int],
) -> None:
    """Checks everything that can be checked before writing, then writes the small files."""
    _check_absent(target)  # another job may have just made it
    for left in partial.iterdir():  # by a killed run
        if left.name != lock.NAME:
            left.unlink()
    check_space(target.parent, sum(sizes.values()))
    create_files(partial, heads, sizes)
    write_index(partial, places)
    for name, content in files.items():
        sealed.write_bytes(partial / name, content)


def _check_absent(target: Path) -> None:
    if target.exists():
        raise ConvertError(f"{target} exists: nothing is overwritten")


def _publish(partial: Path, target: Path) -> None:
    """Gives a whole folder its name. It takes its lock along: a second job that began to write
    here before would have this one's name."""
    sealed.sync_folder(partial)
    partial.rename(target)
    (target / lock.NAME).unlink()
    sealed.sync_folder(target)
    sealed.sync_folder(target.parent)


def _write(
    checkpoint: Checkpoint,
    links: list[ParamMapping],
    partial: Path,
    places: dict[str, Place],
    group: dist.ProcessGroup,
    doing: str,
    quiet: bool,
) -> None:
    mine = share(exports(checkpoint, links), lambda part: part.bytes, group.rank(), group.size())
    total, shown = sum(part.bytes for part in mine), group.rank() == 0 and not quiet
    read = checkpoint.reader.read
    with (
        raising_together(group, doing),
        TensorWriter(partial, places) as writer,
        progress(total, "to Hugging Face", shown) as done,
    ):
        for part in mine:
            if part.carried is not None:
                writer.write(part.carried, read(CARRIED_PREFIX + part.carried))
                done(part.bytes)
                continue
            link = part.link
            assert link is not None  # it is one of the two
            if link.counted:
                mcore = read(weight_key(link.mcore), part.first, part.last)
                for name, tensor in link.to_hf(mcore, part.first):
                    writer.write(name, tensor, 0 if link.separate else part.first)
            else:
                for name, tensor in link.to_hf(read(weight_key(link.mcore)), 0):
                    writer.write(name, tensor)
            done(part.bytes)
        writer.finish()

"""Writes a checkpoint chunk by chunk; ranks share the chunks.

The files do not depend on the layout: a chunk is a whole tensor or some rows of it, and any layout
reads its part of any chunk.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

import megatron_mm
from megatron_mm.checkpoint import folders, sealed, storage
from megatron_mm.checkpoint.collective import raising_together
from megatron_mm.checkpoint.lock import held
from megatron_mm.config import RunConfig, data_parallel_size, to_dict
from megatron_mm.convert.stored import Chunk, ChunkWriter, write_index
from megatron_mm.convert.work import progress, share
from megatron_mm.errors import CheckpointError, ConvertError

ASSETS = "huggingface"  # folder inside a checkpoint


class Part(Protocol):
    """Unit of work: a chunk, of `bytes` when it is read and `written` on the disk."""

    @property
    def bytes(self) -> int: ...

    @property
    def written(self) -> int: ...


# The chunk of a part: key and whole shape of its tensor, its first row in it, its rows.
Made = tuple[str, tuple[int, ...], int, torch.Tensor]


def write_checkpoint[P: Part](
    target: Path,
    iteration: int,
    parts: Sequence[P],
    make: Callable[[P], Made],
    run: RunConfig,
    extra: dict[str, Any],
    assets: Sequence[Path],
    group: dist.ProcessGroup,
    *,
    doing: str,
    what: str,
    quiet: bool,
) -> Path:
    """Writes `target/iter_<iteration>`, weights only, and points `target/latest` to it. Every rank
    calls it.

    Args:
        parts: all units of work, the same on every rank; `make` reads one. Their chunks tile every
            tensor exactly once.
        run: settings to record, with the layout; extra: JSON values to record.
        assets: files of tokenizer and processor, copied into the checkpoint.
        group: gloo group of all ranks.
        doing: the beginning of an error; what: the title of the progress bar.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank; partial output is removed.
    """
    with held(target, group):
        leader = group.rank() == 0
        final = target / folders.name_of(iteration)
        partial = folders.with_suffix(final, folders.PARTIAL)
        drawn = [secrets.token_hex(16)]
        dist.broadcast_object_list(drawn, group=group, group_src=0)
        (identity,) = drawn
        with raising_together(group, doing):
            if leader:
                target.mkdir(parents=True, exist_ok=True)
                folders.check_unused(target, iteration)
                folders.clear_leftovers(target)
                check_space(target, sum(part.written for part in parts))
                partial.mkdir()
        try:
            chunks = _write(parts, make, partial, identity, group, doing, what, quiet)
            with raising_together(group, doing):
                if leader:
                    write_index(partial, chunks, identity)
                    checksums = storage.write_format(partial)
                    if assets:
                        checksums |= _copy(assets, partial / ASSETS)
                    content = _content(run, iteration, extra, identity, checksums)
                    sealed.write_json(partial / folders.RUN, content)
                    sealed.sync_folder(partial)
                    folders.publish(partial, final)
        except CheckpointError:
            if leader:
                with contextlib.suppress(OSError):
                    shutil.rmtree(partial)
            raise
        return final


def check_space(folder: Path, needed: int) -> None:
    """Checks free disk space.

    Raises:
        ConvertError: `needed` bytes do not fit on the disk of `folder`.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConvertError(f"{folder} has {free} bytes of disk left, {needed} are needed")


def _write[P: Part](
    parts: Sequence[P],
    make: Callable[[P], Made],
    partial: Path,
    identity: str,
    group: dist.ProcessGroup,
    doing: str,
    what: str,
    quiet: bool,
) -> list[Chunk]:
    """Writes this rank's share. Returns the chunks of all ranks."""
    mine = share(parts, lambda part: part.bytes, group.rank(), group.size())
    chunks: list[Chunk] = []
    total, shown = sum(part.bytes for part in mine), group.rank() == 0 and not quiet
    with (
        raising_together(group, doing),
        ChunkWriter(partial, group.rank(), identity) as writer,
        progress(total, what, shown) as done,
    ):
        for part in mine:
            key, shape, first, tensor = make(part)
            writer.add(key, tensor, shape, first)
            done(part.bytes)
        chunks = writer.finish()
    every: list = [None] * group.size()
    dist.all_gather_object(every, chunks, group=group)
    return [chunk for written in every for chunk in written]


def _copy(assets: Sequence[Path], folder: Path) -> dict[str, int]:
    """Copies files into a folder of the checkpoint; returns their checksums."""
    folder.mkdir()
    checksums = {}
    for path in assets:
        content = path.read_bytes()
        sealed.write_bytes(folder / path.name, content)
        checksums[f"{folder.name}/{path.name}"] = zlib.crc32(content)
    sealed.sync_folder(folder)
    return checksums


def _content(
    run: RunConfig, iteration: int, extra: dict, identity: str, checksums: dict
) -> dict[str, Any]:
    """Returns what run.json holds."""
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
    return {
        "format": folders.FORMAT,
        "megatron_mm": megatron_mm.__version__,
        "iteration": iteration,
        "identity": identity,
        "layout": layout,
        "adam_step": 0,
        "scheduler": {},
        "loader": {},
        "extra": extra,
        "config": to_dict(run),
        "checksums": checksums,
    }

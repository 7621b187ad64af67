"""From a folder of safetensors to a sharded checkpoint, block by block.

What lies on disk does not depend on the layout: a block is an expert or several, or a whole
tensor, and any layout reads its part of any block. Ranks share the blocks among them.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import megatron_mm
from megatron_mm.checkpoint import folders, sealed, storage
from megatron_mm.checkpoint.collective import raising_together
from megatron_mm.checkpoint.compatible import CARRIED_PREFIX
from megatron_mm.checkpoint.shards import weight_key
from megatron_mm.config import RunConfig, data_parallel_size, to_dict
from megatron_mm.convert.folder import NOTES, HFFolder
from megatron_mm.convert.mapping import ParamMapping, StateMapping
from megatron_mm.convert.stored import BLOCK_BYTES, Block, BlockWriter, write_index
from megatron_mm.convert.work import nbytes, progress, row_ranges, share
from megatron_mm.errors import CheckpointError, ConvertError
from megatron_mm.parallel.param_layout import ParamLayout, draw

ASSETS = "huggingface"  # folder inside a checkpoint


@dataclass(frozen=True)
class Import:
    """A block to be written: of a link, of a new parameter, or a carried tensor."""

    key: str
    bytes: int
    first: int = 0
    last: int = 0
    link: ParamMapping | None = None
    new: str | None = None
    carried: str | None = None


def dtype_of(source: HFFolder, plan: StateMapping, dtype: torch.dtype | None) -> torch.dtype:
    """What new parameters are written in: what was asked for, or what the embedding is in."""
    return dtype or source.tensors[plan.links[0].names[0].replace("{expert}", "0")].dtype


def jobs(
    source: HFFolder,
    plan: StateMapping,
    parameters: Mapping[str, ParamLayout],
    dtype: torch.dtype | None,
) -> list[Import]:
    found = []
    for link in plan.links:
        name = link.names[0].replace("{expert}", "0")
        size = (dtype or source.tensors[name].dtype).itemsize
        found += _of_rows(weight_key(link.mcore), link.shape, link.counted, size, link=link)
    for name in plan.new:
        layout = parameters[name]
        size = dtype_of(source, plan, dtype).itemsize
        found += _of_rows(
            weight_key(name), layout.global_shape, layout.rows_drawn_alone, size, new=name
        )
    for name in plan.carried:
        found.append(Import(CARRIED_PREFIX + name, source.tensors[name].nbytes, carried=name))
    return found


def _of_rows(key: str, shape: tuple[int, ...], counted: bool, size: int, **what) -> list[Import]:
    if not counted:
        return [Import(key, nbytes(shape, size), **what)]
    row = nbytes(shape[1:], size)
    ranges = row_ranges(shape[0], row, BLOCK_BYTES)
    return [Import(key, (last - first) * row, first, last, **what) for first, last in ranges]


def _make(
    job: Import,
    source: HFFolder,
    parameters: Mapping[str, ParamLayout],
    dtype: torch.dtype | None,
    start: torch.dtype,
    seed: int,
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """(the block, shape of the whole)"""
    if job.carried is not None:
        tensor = source.read(job.carried, None, None)
        return tensor, tuple(tensor.shape)
    if job.link is not None:
        tensor = job.link.to_mcore(source.read, job.first, job.last)
        return tensor.to(dtype or tensor.dtype), job.link.shape
    layout = parameters[job.new]
    if not layout.rows_drawn_alone:
        return draw(layout, job.new, seed).to(start), layout.global_shape
    rows = [draw(layout, job.new, seed, i) for i in range(job.first, job.last)]
    return torch.stack(rows).to(start), layout.global_shape


def convert(
    source: HFFolder,
    plan: StateMapping,
    parameters: Mapping[str, ParamLayout],
    run: RunConfig,
    target: Path,
    group: dist.ProcessGroup,
    *,
    dtype: torch.dtype | None = None,
    quiet: bool = False,
) -> Path:
    """Write `target/iter_0000000` and point `target/latest` to it. Every rank calls it.

    Args:
        run: the model and the layout that the checkpoint is for; its seed draws what is new.
        group: gloo group of everybody.
        dtype: of the model's tensors; None: as they are.

    Raises:
        CheckpointError: on every rank; nothing is left behind.
    """
    leader = group.rank() == 0
    final = target / folders.name_of(0)
    partial = folders.with_suffix(final, folders.PARTIAL)
    doing = f"cannot convert {source.folder} to {target}"
    work = jobs(source, plan, parameters, dtype)
    with raising_together(group, doing):
        if leader:
            _prepare(target, partial, sum(job.bytes for job in work))
    try:
        blocks = _write(source, plan, parameters, work, run, partial, group, doing, dtype, quiet)
        with raising_together(group, doing):
            if leader:
                _finish(source, blocks, run, partial)
                folders.publish(partial, final)
    except CheckpointError:
        if leader:
            with contextlib.suppress(OSError):
                shutil.rmtree(partial)
        raise
    return final


def _prepare(target: Path, partial: Path, needed: int) -> None:
    target.mkdir(parents=True, exist_ok=True)
    # One that was killed between its last two lines left `iter_0000000` without `latest`:
    # nobody finds it there, and `publish` replaces it.
    found = {path.name for path in target.iterdir() if folders.NAME.fullmatch(path.name)}
    if (target / folders.LATEST).exists() or found - {folders.name_of(0)}:
        raise ConvertError(f"{target} holds checkpoints already: nothing is overwritten")
    folders.clear_leftovers(target)
    check_space(target, needed)
    partial.mkdir()


def check_space(folder: Path, needed: int) -> None:
    """Raises ConvertError if `needed` bytes do not fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConvertError(f"{folder} has {free} bytes of disk left, {needed} are needed")


def _write(source, plan, parameters, work, run, partial, group, doing, dtype, quiet) -> list[Block]:
    """This rank's share; the blocks of all ranks."""
    start, seed = dtype_of(source, plan, dtype), run.training.seed
    mine = share(work, lambda job: job.bytes, group.rank(), group.size())
    blocks: list[Block] = []
    total, shown = sum(job.bytes for job in mine), group.rank() == 0 and not quiet
    with (
        raising_together(group, doing),
        BlockWriter(partial, group.rank()) as writer,
        progress(total, "to megatron", shown) as done,
    ):
        for job in mine:
            tensor, shape = _make(job, source, parameters, dtype, start, seed)
            writer.add(job.key, tensor, shape, job.first)
            done(job.bytes)
        blocks = writer.finish()
    every: list = [None] * group.size()
    dist.all_gather_object(every, blocks, group=group)
    return [block for part in every for block in part]


def _finish(source: HFFolder, blocks: list[Block], run: RunConfig, partial: Path) -> None:
    write_index(partial, blocks)
    (partial / ASSETS).mkdir()
    for path in source.assets:
        sealed.write_bytes(partial / ASSETS / path.name, path.read_bytes())
    sealed.sync_folder(partial / ASSETS)
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
        "layout": layout,
        "adam_step": 0,
        "scheduler": {},
        "loader": {},
        "extra": {NOTES: source.notes},
        "config": to_dict(run),
        "checksums": storage.write_format(partial),
    }
    sealed.write_json(partial / folders.RUN, content)
    sealed.sync_folder(partial)

"""Saving in two halves: copy what a rank holds, then write the copy.

`take` needs the engine and all its process groups. `write` needs only the copy and one gloo group,
neither engine nor device, so it can run while training goes on.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import secrets
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

import megatron_mm
from megatron_mm.checkpoint import folders, optimizer_state, rng, sealed, shards, storage
from megatron_mm.checkpoint.collective import raising_together
from megatron_mm.checkpoint.finite import not_finite
from megatron_mm.checkpoint.parameters import finish_param_gather, parameters
from megatron_mm.config import to_dict
from megatron_mm.engine.engine import Engine
from megatron_mm.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """State that one rank writes. Shares no memory with the engine, so later steps cannot alter it.

    Attributes:
        tensors: this rank's shards, on the CPU.
        generators: content of its generator file.
        run: content of run.json, with the checksums known so far. Its "identity" is drawn anew for
            every save.
    """

    iteration: int
    tensors: list[ShardedTensor]
    generators: bytes
    run: dict


def take(engine: Engine, loader_state: dict, iteration: int, extra: dict | None = None) -> Snapshot:
    """Copies what this rank will write. Every rank calls it, in the training thread.

    Raises:
        CheckpointError: on every rank; `loader_state` or `extra` has no JSON form, or parameters
            took different numbers of steps, or a weight or the optimizer's state is not finite.
    """
    finish_param_gather(engine)
    doing = f"cannot save iteration {iteration}"
    with raising_together(engine.groups.world, doing):
        ruined = not_finite(engine)
        if ruined:
            raise CheckpointError(
                f"{ruined} is not finite; earlier checkpoints are kept: go on from one of them"
            )
    tensors, steps = _tensors(engine)
    buffer = io.BytesIO()
    torch.save(rng.capture(), buffer)
    generators = buffer.getvalue()
    notes: list = [None] * engine.groups.world.size()
    dist.all_gather_object(
        notes, (steps, zlib.crc32(generators), secrets.token_hex(16)), group=engine.groups.world
    )
    run = {
        "format": folders.FORMAT,
        "megatron_mm": megatron_mm.__version__,
        "iteration": iteration,
        "identity": notes[0][2],
        "layout": layout_of(engine),
        "adam_step": 0,
        "scheduler": engine.scheduler.state_dict(),
        "loader": loader_state,
        "extra": extra or {},
        "config": to_dict(engine.run),
        "checksums": {rng_name(rank): checksum for rank, (_, checksum, _) in enumerate(notes)},
    }
    with raising_together(engine.groups.world, doing):
        run["adam_step"] = _same_step(set().union(*(found for found, _, _ in notes)))
        if dist.get_rank() == 0:
            # A copy, because callers may change the values. NaN has no JSON form either.
            run = json.loads(json.dumps(run, allow_nan=False))
    return Snapshot(iteration, tensors, generators, run)


def _tensors(engine: Engine) -> tuple[list[ShardedTensor], set[int]]:
    """Returns (copies of the shards this rank writes, step counts of its stage)."""
    replicas = shards.replicas(engine)
    mine = {name for name, copy in replicas.items() if not any(copy)}
    saved = {name: shards.kinds_saved(param.dtype) for name, param, _ in parameters(engine)}
    state = optimizer_state.collect(engine, lambda kind, n: n in mine and kind in saved[n])
    tensors = []
    for name, param, layout in parameters(engine):
        if name in mine and not shards.is_padding(layout):
            weight = param.detach().to("cpu", copy=True)
            tensors.append(shards.to_shard(shards.weight_key(name), layout, weight))
            for kind in saved[name] if name in state else ():
                key = shards.state_key(kind, name)
                tensors.append(shards.to_shard(key, layout, state[name][kind]))
            for which, moving in engine.moving.items():
                if name in moving.names:
                    copy = moving.weights[name].clone()  # the set moves on in place
                    tensors.append(shards.to_shard(shards.moving_key(which, name), layout, copy))
    return tensors, {int(entry["step"]) for entry in state.values()}


def _same_step(steps: set[int]) -> int:
    if len(steps) > 1:
        raise CheckpointError(f"parameters took different numbers of steps: {sorted(steps)}")
    return max(steps, default=0)


def rng_name(rank: int) -> str:
    return f"rng_{rank:05d}.pt"


def layout_of(engine: Engine) -> dict[str, int]:
    pg = engine.groups.pg
    sizes = {
        "tp": pg.tp,
        "pp": pg.pp,
        "cp": pg.cp,
        "ep": pg.ep,
        "expert_tp": pg.expt_tp,
        "dp": pg.dp,
    }
    return {name: group.size() for name, group in sizes.items()}


def write(
    snapshot: Snapshot, folder: Path, group: dist.ProcessGroup, keep_last: int | None = None
) -> Path:
    """Writes `folder/iter_<iteration>` and points `folder/latest` to it. Every rank calls it.

    Args:
        group: gloo group of all ranks that no other thread uses meanwhile.
        keep_last: number of checkpoints to keep; older ones are deleted. None: keep all.

    Raises:
        CheckpointError: on every rank; a rank could not write. Earlier checkpoints are intact
            and the unfinished one is removed.
    """
    leader = group.rank() == 0
    final = folder / folders.name_of(snapshot.iteration)
    partial = folders.with_suffix(final, folders.PARTIAL)
    try:
        _write(snapshot, partial, final, group, f"cannot save {final}")
    except CheckpointError:
        if leader:
            with contextlib.suppress(OSError):
                folders.clear_leftovers(folder)
        raise
    if leader and keep_last:
        try:
            folders.prune(folder, keep_last, snapshot.iteration)
        except OSError as error:  # the new checkpoint is saved, so training goes on
            logger.warning("could not delete old checkpoints: %s", error)
    return final


def _write(
    snapshot: Snapshot, partial: Path, final: Path, group: dist.ProcessGroup, doing: str
) -> None:
    leader = group.rank() == 0
    with raising_together(group, doing):
        if leader:
            final.parent.mkdir(parents=True, exist_ok=True)
            folders.clear_leftovers(final.parent)
            partial.mkdir()
    with raising_together(group, doing):
        storage.write_tensors(snapshot.tensors, partial, group, snapshot.run["identity"])
    with raising_together(group, doing):
        sealed.write_bytes(partial / rng_name(group.rank()), snapshot.generators)
        if leader:
            checksums = snapshot.run["checksums"] | storage.write_format(partial)
            sealed.write_json(partial / folders.RUN, snapshot.run | {"checksums": checksums})
            sealed.sync_folder(partial)
    with raising_together(group, doing):
        if leader:
            folders.publish(partial, final)

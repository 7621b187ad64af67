"""Saves and loads a run: weights, optimizer, schedule, data position, random generators, and the
sets of weights that move with the model's (`Engine.moving`).

A checkpoint is a folder `iter_0000120` with tensors in megatron-core's distributed format,
`run.json`, and one generator file per rank. It is written under another name and renamed when
every rank has succeeded; only then does `latest` point to it. Shards are saved with their place in
the whole tensor, so any layout can load them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mm.checkpoint import folders, optimizer_state, rng, sealed, shards, storage
from megatron_mm.checkpoint.collective import raising_together
from megatron_mm.checkpoint.compatible import (
    CARRIED_PREFIX,
    check_adapters,
    check_model,
    check_tensors,
    narrows,
)
from megatron_mm.checkpoint.index import check_whole
from megatron_mm.checkpoint.parameters import begin_copies, finish_param_gather, parameters
from megatron_mm.checkpoint.plain_pickle import shown
from megatron_mm.checkpoint.shards import weight_key
from megatron_mm.checkpoint.snapshot import layout_of, rng_name, take, write
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.weight_set import Weights
from megatron_mm.errors import CheckpointError
from megatron_mm.parallel.groups import Groups
from megatron_mm.parallel.param_layout import initialize_one


def save(
    engine: Engine,
    loader_state: dict,
    folder: Path,
    iteration: int,
    extra: dict | None = None,
) -> Path:
    """Writes `folder/iter_<iteration>` and points `folder/latest` to it. Every rank calls it.

    A run saves through `saver.Saver`, which can do so in the background.

    Args:
        loader_state, extra: JSON values, taken from rank 0.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank; a rank could not write. Earlier checkpoints are intact.
    """
    taken = take(engine, loader_state, iteration, extra)
    return write(taken, Path(folder), engine.groups.world)


def find(groups: Groups, folder: Path | str) -> tuple[Path, dict[str, Any]]:
    """Returns (checkpoint, content of its run.json) as rank 0 finds them; see `folders.resolve`.
    Every rank calls it.

    Raises:
        CheckpointError: on every rank; there is no complete checkpoint.
    """
    found: list[Any] = [None]
    with raising_together(groups.world, f"cannot load {folder}"):
        if dist.get_rank() == 0:
            found = [folders.resolve(Path(folder))]
    dist.broadcast_object_list(found, src=0, group=groups.world)
    return found[0]


def load(engine: Engine, folder: Path, *, finetune: bool = False) -> dict[str, Any]:
    """Overwrites the engine's state from a checkpoint. Every rank calls it.

    Args:
        folder: a checkpoint, or the folder of checkpoints whose `latest` names one.
        finetune: loads only weights. Optimizer, schedule, generators and sets that move stay as
            they are; parameters that the checkpoint may lack (`check_tensors`) are drawn from the
            seed, or copied from another one (`ParamLayout.copies`).

    Returns:
        "iteration", "loader" and "extra" as saved; "initialized": names of parameters that the
        checkpoint lacks; "ignored": keys of tensors that this model lacks, or that a conversion
        carried along; "changed": `check_model`'s lines; "narrowed": names of this rank's
        parameters that have fewer digits than what is stored. Generators are restored
        only on the same layout.

    Raises:
        CheckpointError: on every rank, before anything changes; it does not fit or is damaged.
    """
    groups = engine.groups
    doing = f"cannot load {folder}"
    path, run = find(groups, folder)
    expected = shards.expected_shapes(engine, weights_alone=finetune)
    with raising_together(groups.world, doing):
        changed = check_model(run["config"]["model"], engine.run.model, finetune=finetune)
        check_adapters(run["config"].get("lora") or {}, engine.run.lora)
        _check_precision(run["config"], engine, finetune)
        stored, index = storage.read_index(path, run["checksums"], run["identity"])
        added = check_tensors(stored, expected, finetune=finetune)
        _check_scheduler(run["scheduler"], engine, finetune)
        check_whole(index)
        storage.check_files(path, index, groups.world.rank(), groups.world.size())
    same_layout = run["layout"] == layout_of(engine)
    with raising_together(groups.world, doing):
        wanted = shards.empty_shards(engine, set(stored), weights_alone=finetune)
        shards.check_complete(engine, wanted.keys(), set(added))
        storage.read_tensors(wanted, path, index, run["identity"])
        generators = None
        if same_layout and not finetune:
            name = rng_name(dist.get_rank())
            content = sealed.read_bytes(path / name, run["checksums"].get(name))
            generators = rng.checked(content, path / name)
    finish_param_gather(engine)  # a gather under way would overwrite loaded weights
    weights = {key: x.data.dtype for key, x in wanted.items() if key.startswith(weight_key(""))}
    tensors = {key: wanted.pop(key).data for key in [*wanted]}  # freed as they are applied
    _apply(engine, tensors, set(added), run, finetune)
    if generators is not None:
        rng.restore(generators)
    return {
        "iteration": run["iteration"],
        "loader": run["loader"],
        "extra": run["extra"],
        "initialized": [key.removeprefix("model.") for key in added],
        "ignored": [
            *(k for k in stored if k.startswith(CARRIED_PREFIX)),
            *(k for k in stored if k.startswith(weight_key("")) and k not in expected),
        ],
        "changed": changed,
        "narrowed": [
            key.removeprefix(weight_key(""))
            for key, here in weights.items()
            if narrows(index.tensors[key].dtype, here)
        ],
    }


def _check_precision(config: dict, engine: Engine, finetune: bool) -> None:
    there, here = config["training"].get("bf16"), engine.run.training.bf16
    if there != here and not finetune:
        raise CheckpointError(
            f"training.bf16 is {shown(there)} there and {here} here; only finetune may change it"
        )


def _check_scheduler(stored: dict, engine: Engine, finetune: bool) -> None:
    """Checks that the schedule's state has the values of ours by name and type."""
    if finetune:
        return
    for key, value in engine.scheduler.state_dict().items():
        found: Any = stored.get(key)
        if type(value) in (int, float):
            fine = type(found) in (int, float) and abs(found) < 2**53  # NaN is not
        else:
            fine = type(found) is type(value)
        if not fine:
            raise CheckpointError(
                f"its {folders.RUN} is damaged: scheduler.{key} is {shown(found)}"
            )
    steps = stored["num_steps"]
    if type(steps) is not int or not 0 <= steps < 2**53:
        raise CheckpointError(
            f"its {folders.RUN} is damaged: scheduler.num_steps is {shown(steps)}"
        )


@torch.no_grad()
def _apply(
    engine: Engine,
    tensors: dict[str, torch.Tensor],
    added: set[str],
    run: dict,
    finetune: bool,
) -> None:
    """Writes loaded tensors into the engine and draws those that are new. Local: waits for no rank,
    reads no file. Takes out of `tensors` what it has applied: copies of all would double the host
    memory that resuming needs."""
    state: optimizer_state.State = {}
    names = [name for name, *_ in parameters(engine)]
    mine = optimizer_state.owned(engine)
    for name, param, layout in parameters(engine):
        value = tensors.pop(weight_key(name), None)
        if value is not None:
            layout.held(param.data).copy_(value)
        elif weight_key(name) in added:
            initialize_one(name, param, layout, engine.run.training.seed)
        if name in mine and not finetune:
            state[name] = {
                kind: shards.from_shard(
                    tensors.pop(shards.state_key(kind, name), None), layout, param
                )
                for kind in shards.kinds_saved(param.dtype)
            } | {"step": torch.tensor(run["adam_step"])}
    if finetune:
        begin_copies(engine, {name for name in names if shards.weight_key(name) in added})
        engine.optimizer.reload_model_params()
        return
    for which, moving in engine.moving.items():
        moving.fill(_moving(engine, which, tensors))
    optimizer_state.restore(engine, state)
    engine.scheduler.num_steps = 0  # load_state_dict adds to it (optimizer_param_scheduler.py:390)
    engine.scheduler.load_state_dict(run["scheduler"])


def _moving(engine: Engine, which: str, tensors: dict[str, torch.Tensor]) -> Weights:
    """Returns the weights of a set that moves, shaped like the parameters."""
    moving, found = engine.moving[which], {}
    for name, param, layout in parameters(engine):
        if name in moving.names:
            data = tensors.get(shards.moving_key(which, name))
            found[name] = shards.from_shard(data, layout, param, moving.dtype or param.dtype)
    return found

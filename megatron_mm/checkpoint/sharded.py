"""Save and load a run: weights, optimizer, schedule, data position, generators.

A checkpoint is a folder `iter_0000120` of tensors in megatron-core's distributed format,
`run.json` and one generator file per rank. It is written under another name and renamed
when every rank has succeeded; only then does `latest` point to it. Tensors are saved at
their place in the whole tensor, so any layout reads what any other wrote.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_mm
from megatron_mm.checkpoint import blocks, folders, optimizer_state, rng, storage
from megatron_mm.checkpoint.compatible import check_adapters, check_model, check_tensors
from megatron_mm.checkpoint.engine import Engine
from megatron_mm.checkpoint.errors import CheckpointError, together
from megatron_mm.config import to_dict
from megatron_mm.parallel.layout import layouts


def save(
    engine: Engine,
    loader_state: dict,
    folder: Path,
    iteration: int,
    extra: dict | None = None,
) -> Path:
    """Write `folder/iter_<iteration>` and point `folder/latest` to it. Every rank calls it.

    Args:
        loader_state, extra: JSON values, taken from rank 0.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: a rank could not write (on every rank). Earlier checkpoints are intact.
    """
    groups, folder = engine.groups, Path(folder)
    final = folder / f"iter_{iteration:07d}"
    partial = final.with_name(final.name + folders.PARTIAL)
    doing = f"cannot save {final}"
    leader = dist.get_rank() == 0
    _settle(engine)
    with together(groups, doing):
        if leader:
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
    tensors, step = _snapshot(engine)
    with together(groups, doing):
        step = _same_step(step)
        storage.write_tensors(tensors, partial, groups)
    with together(groups, doing):
        storage.write_object(partial / _rng_name(), rng.capture())
        if leader:
            storage.write_json(
                partial / folders.RUN,
                {
                    "format": folders.FORMAT,
                    "megatron_mm": megatron_mm.__version__,
                    "iteration": iteration,
                    "layout": _layout(engine),
                    "adam_step": step,
                    "scheduler": engine.scheduler.state_dict(),
                    "loader": loader_state,
                    "extra": extra or {},
                    "config": to_dict(engine.run),
                },
            )
            storage.write_format(partial)
            storage.sync_folder(partial)
    with together(groups, doing):
        if leader:
            folders.publish(partial, final)
    return final


def _settle(engine: Engine) -> None:
    """With overlapped gathers a rank has new weights only where it owns them until the next
    forward pass: finish that now."""
    if engine.run.parallel.overlap_param_gather:
        for model in engine.models:
            model.start_param_sync(force_sync=True)


def _snapshot(engine: Engine) -> tuple[list, set[int]]:
    """The blocks that this rank writes, and the step counts of its stage. Collective."""
    replicas = blocks.replicas(engine)
    mine = {name for name, copy in replicas.items() if not any(copy)}
    saved = {name: blocks.kinds_saved(param) for name, param, _ in layouts(*engine.chunks)}
    state = optimizer_state.collect(engine, lambda kind, n: n in mine and kind in saved[n])
    tensors = []
    for name, param, layout in layouts(*engine.chunks):
        if name in mine:
            tensors.append(blocks.block(blocks.weight_key(name), layout, param))
            for kind in saved[name] if name in state else ():
                tensors.append(
                    blocks.block(blocks.state_key(kind, name), layout, state[name][kind])
                )
    found: list[set[int]] = [set()] * engine.groups.world.size()
    steps = {int(entry["step"]) for entry in state.values()}
    dist.all_gather_object(found, steps, group=engine.groups.world)
    return tensors, set().union(*found)


def _same_step(steps: set[int]) -> int:
    if len(steps) > 1:
        raise CheckpointError(f"parameters took different numbers of steps: {sorted(steps)}")
    return max(steps, default=0)


def _rng_name() -> str:
    return f"rng_{dist.get_rank():05d}.pt"


def _layout(engine: Engine) -> dict[str, int]:
    pg = engine.groups.pg
    sizes = {"tp": pg.tp, "pp": pg.pp, "ep": pg.ep, "expert_tp": pg.expt_tp, "dp": pg.dp_cp}
    return {name: group.size() for name, group in sizes.items()}


def load(engine: Engine, folder: Path, *, finetune: bool = False) -> dict[str, Any]:
    """Overwrite the engine's state from a checkpoint. Every rank calls it.

    Args:
        folder: a checkpoint, or the folder of checkpoints whose `latest` names one.
        finetune: weights only. Optimizer, schedule and generators stay as they are; CLVR's
            and adapters' parameters that the checkpoint lacks stay as initialised.

    Returns:
        "iteration", "consumed_samples" (None if the loader has no such number), "loader",
        "extra", "config" as saved; "folder" that was read; "rng_restored" (same layout only);
        "initialized": names of the parameters that were not in the checkpoint.

    Raises:
        CheckpointError: it does not fit or is damaged (on every rank, before anything changed).
    """
    groups = engine.groups
    doing = f"cannot load {folder}"
    found: list[Any] = [None]
    with together(groups, doing):
        if dist.get_rank() == 0:
            found = [folders.resolve(Path(folder))]
    dist.broadcast_object_list(found, src=0, group=groups.world)
    path, run = found[0]
    expected = blocks.expected_shapes(engine, with_optimizer=not finetune)
    with together(groups, doing):
        check_model(run["config"]["model"], engine.run.model, finetune=finetune)
        check_adapters(run["config"].get("lora", {}), engine.run.lora)
        _check_precision(run["config"], engine, finetune)
        stored, index = storage.read_index(path)
        added = check_tensors(stored, expected, finetune=finetune)
        if dist.get_rank() == 0:
            storage.check_files(path, index)
    same_layout = run["layout"] == _layout(engine)
    with together(groups, doing):
        wanted = blocks.empty_blocks(engine, set(stored), with_optimizer=not finetune)
        storage.read_tensors(wanted, path)
        generators = None
        if same_layout and not finetune:
            generators = torch.load(path / _rng_name(), weights_only=True)
    _settle(engine)  # else a gather under way would overwrite what is loaded
    _apply(engine, {key: entry.data for key, entry in wanted.items()}, run, finetune)
    if generators is not None:
        rng.restore(generators)
    return {
        "iteration": run["iteration"],
        "consumed_samples": run["loader"].get("consumed_samples"),
        "loader": run["loader"],
        "extra": run["extra"],
        "config": run["config"],
        "folder": path,
        "rng_restored": generators is not None,
        "initialized": [key.removeprefix("model.") for key in added],
    }


def _check_precision(config: dict, engine: Engine, finetune: bool) -> None:
    there, here = config["training"]["bf16"], engine.run.training.bf16
    if there != here and not finetune:
        raise CheckpointError(
            f"training.bf16 is {there} there and {here} here; only finetune may change it"
        )


@torch.no_grad()
def _apply(engine: Engine, tensors: dict[str, torch.Tensor], run: dict, finetune: bool) -> None:
    """Nothing here waits for another rank or reads a file."""
    for name, param, layout in layouts(*engine.chunks):
        value = tensors.get(blocks.weight_key(name))
        if value is not None:
            param.data.view(layout.local_shape).copy_(value)
    if finetune:
        engine.optimizer.reload_model_params()
        return
    state: optimizer_state.State = {}
    for name in optimizer_state.owned(engine):
        keys = {kind: blocks.state_key(kind, name) for kind in optimizer_state.KINDS}
        state[name] = {kind: tensors[key] for kind, key in keys.items() if key in tensors}
        state[name]["step"] = torch.tensor(run["adam_step"])
    optimizer_state.restore(engine, state)
    engine.scheduler.num_steps = 0  # load_state_dict adds to it (optimizer_param_scheduler.py:390)
    engine.scheduler.load_state_dict(run["scheduler"])

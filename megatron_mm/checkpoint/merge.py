"""Merges LoRA adapters into the weights of a checkpoint, on any layout."""

from __future__ import annotations

from pathlib import Path

from megatron_mm.checkpoint import folders, sharded
from megatron_mm.checkpoint.collective import raising_together
from megatron_mm.checkpoint.lock import held
from megatron_mm.config import LoraConfig
from megatron_mm.engine.engine import Engine
from megatron_mm.errors import CheckpointError
from megatron_mm.model.layers.lora import merge


def merge_adapters(engine: Engine, source: Path, target: Path) -> Path:
    """Loads `source`, adds every adapter to its weight, and writes only weights to `target`.

    Every rank calls it. The engine keeps neither adapters nor trainable parameters.

    Args:
        engine: engine with the model and adapters of `source`.

    Returns:
        Folder of the new checkpoint. It has no optimizer state, so only a fine-tune can start
        from it.

    Raises:
        CheckpointError: on every rank, if `source` does not fit or has no adapters, or `target`
            holds checkpoints.
    """
    with held(target, engine.groups.world):
        return _merged(engine, source, target)


def _merged(engine: Engine, source: Path, target: Path) -> Path:
    state = sharded.load(engine, source, finetune=True)
    if state["initialized"]:
        raise CheckpointError(f"cannot merge {source}: it lacks {state['initialized'][0]}")
    with raising_together(engine.groups.world, f"cannot merge {source}"):
        if engine.groups.world.rank() == 0:
            folders.check_unused(target, state["iteration"])
    for module in engine.modules:
        merge(module)
        module.requires_grad_(False)  # nothing trainable, so no optimizer state is written
    engine.run.lora = LoraConfig()
    return sharded.save(engine, state["loader"], target, state["iteration"], state["extra"])

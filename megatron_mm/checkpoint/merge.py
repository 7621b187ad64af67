"""From a checkpoint with LoRA adapters to a plain one, on whatever layout the engine has."""

from __future__ import annotations

from pathlib import Path

from megatron_mm.checkpoint import sharded
from megatron_mm.config import LoraConfig
from megatron_mm.engine.engine import Engine
from megatron_mm.errors import CheckpointError
from megatron_mm.model.layers.lora import merge


def merge_adapters(engine: Engine, source: Path, target: Path) -> Path:
    """Load `source`, add every adapter to its weight, write weights only to `target`.

    Every rank calls it. The engine is left without adapters and with nothing to train.

    Args:
        engine: of the model and the adapters that `source` holds.

    Returns:
        The new checkpoint's folder. Only a fine-tune can start from it: it holds no optimizer
        state, since the merged weights never had any.

    Raises:
        CheckpointError: on every rank, if `source` does not fit or has no adapters.
    """
    state = sharded.load(engine, source, finetune=True)
    if state["initialized"]:
        raise CheckpointError(f"cannot merge {source}: it lacks {state['initialized'][0]}")
    for chunk in engine.chunks:
        merge(chunk)
        chunk.requires_grad_(False)  # nothing trainable, so no optimizer state is written
    engine.run.lora = LoraConfig()
    return sharded.save(engine, state["loader"], target, state["iteration"], state["extra"])

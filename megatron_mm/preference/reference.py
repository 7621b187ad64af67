"""The reference model of a run on preference pairs: a checkpoint, or what the run started from.

The starting weights are copied to host memory before the first step, those that learn alone: the
others stay as they are. A resumed run has others by then, and loads them from where its checkpoint
says that they came from, unless the reference moves: then it is in the checkpoint. With LoRA the
adapters of the copy are switched off.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from megatron_mm.checkpoint import sharded
from megatron_mm.checkpoint.parameters import parameters
from megatron_mm.checkpoint.weight_sets import WeightSets, copied, loaded
from megatron_mm.config import modules_of
from megatron_mm.convert.live import load_hf
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.weight_set import Weights
from megatron_mm.errors import CheckpointError
from megatron_mm.model.layers.lora import is_adapter
from megatron_mm.preference.settings import DPOConfig
from megatron_mm.rl.reference import goes_on, hold_reference, weights_of
from megatron_mm.rl.reference_settings import ReferenceConfig

# {"load": checkpoint} or {"load_hf": folder}; None: drawn from the seed, or not needed.
Origin = dict[str, str] | None


def open_reference(engine: Engine) -> tuple[WeightSets, Origin]:
    """Returns the reference model, and where its weights come from if the settings alone do not say
    so to a run that is resumed. Every rank calls it, before weights and optimizer are loaded.

    Raises:
        CheckpointError: on every rank.
    """
    run, sets = engine.run, WeightSets(engine)
    named, folder = run.section(DPOConfig).dpo_ref_load, run.checkpoint.load
    if named:
        every = reference_names(engine)
        hold_reference(sets, engine, every, lambda: weights_of(engine, named))
        return sets, None
    learners = reference_names(engine)
    starting = partial(hold_reference, sets, engine, learners, late=True)
    if not goes_on(run):
        starting(lambda: _starting(engine, learners))
        return sets, _origin(engine)
    assert folder is not None  # `goes_on` says so
    origin: Origin = sharded.find(engine.groups, folder)[1]["loader"].get("started_from")
    moves = run.section(ReferenceConfig).sync_ref_model
    if moves or not any(run.trains(module) for module in modules_of(run.model)):  # but adapters
        starting(lambda: _starting(engine, learners))
        return sets, origin
    if origin is None:
        raise CheckpointError(
            f"dpo.dpo_ref_load is None, and {folder} names no weights that its run "
            "started from; set dpo_ref_load to a checkpoint of the reference model"
        )
    weights = loaded(engine, lambda: _load(engine, origin))
    kept = _switched_off({name: weights[name] for name in learners})
    starting(lambda: kept)
    return sets, origin


def reference_names(engine: Engine) -> list[str]:
    """Returns the names of the parameters that the reference has of its own: all of a checkpoint's,
    else those that learn."""
    every = bool(engine.run.section(DPOConfig).dpo_ref_load)
    held = parameters(engine)
    return [name for name, param, of in held if every or param.requires_grad or of.set_by_run]


def _starting(engine: Engine, names: list[str]) -> Weights:
    """Returns the engine's weights as they are, without what adapters add."""
    return _switched_off(copied(engine, {*names}))


def _switched_off(weights: Weights) -> Weights:
    """Returns weights whose adapters add nothing: B of B A x is zero."""
    return {
        name: torch.zeros_like(weight) if is_adapter(name) and name.endswith(".b") else weight
        for name, weight in weights.items()
    }


def _origin(engine: Engine) -> Origin:
    """Returns what a run that starts here will have loaded."""
    checkpoint = engine.run.checkpoint
    if checkpoint.load_hf:
        return {"load_hf": str(Path(checkpoint.load_hf).resolve())}
    if checkpoint.load:  # the checkpoint itself: `latest` of its folder may move on
        return {"load": str(sharded.find(engine.groups, checkpoint.load)[0].resolve())}
    return None


def _load(engine: Engine, origin: dict[str, str]) -> None:
    if "load_hf" in origin:
        load_hf(engine, Path(origin["load_hf"]))
    else:
        sharded.load(engine, Path(origin["load"]), finetune=True)

"""The weights beside the policy's: the reference model, which may follow it, and the teachers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_mm.checkpoint import sharded
from megatron_mm.checkpoint.collective import raising_together
from megatron_mm.checkpoint.compatible import check_model
from megatron_mm.checkpoint.parameters import parameters
from megatron_mm.checkpoint.weight_sets import WeightSets, loaded
from megatron_mm.config.settings import RunConfig
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.weight_set import Weights, WeightSet
from megatron_mm.rl.reference_settings import ReferenceConfig
from megatron_mm.rl.settings import RLConfig, teacher_folders

REFERENCE = "reference"


def teacher_set(name: str) -> str:
    """The name of a teacher's set of weights."""
    return f"teacher {name}"


def open_sets(engine: Engine) -> WeightSets:
    """Returns the reference model and the teachers that the settings name. Every rank calls it,
    before an optimizer's state is loaded.

    Raises:
        CheckpointError: on every rank, for a checkpoint that does not fit.
    """
    rl, sets = engine.run.section(RLConfig), WeightSets(engine)
    if rl.ref_load:
        folder, names = rl.ref_load, [name for name, _, _ in parameters(engine)]
        hold_reference(sets, engine, names, lambda: weights_of(engine, folder))
    known: dict[str, WeightSet] = {}  # a checkpoint with several names is held once
    for name, folder in teacher_folders(rl).items():
        if folder not in known:
            known[folder] = WeightSet.of(_teacher(engine, name, folder))
        sets.add(teacher_set(name), known[folder])
    return sets


def weights_of(engine: Engine, folder: str) -> Weights:
    """Returns the weights of a checkpoint; see `loaded`.

    Raises:
        CheckpointError: on every rank, if it does not fit.
    """
    return loaded(engine, lambda: sharded.load(engine, Path(folder), finetune=True))


def hold_reference(
    sets: WeightSets,
    engine: Engine,
    names: Sequence[str],
    make: Callable[[], Weights],
    *,
    late: bool = False,
) -> None:
    """Adds the reference model. A resumed run whose reference moves has it from its checkpoint.

    Args:
        names: of its parameters; make: see `WeightSet`.
        late: call `make` only when the first step needs it.
    """
    config = engine.run.section(ReferenceConfig)
    moves = config.sync_ref_model
    # In bf16 the share of a small step would round away.
    averages = moves and config.ref_model_mixup_alpha < 1
    weights = WeightSet(names, make, torch.float32 if averages else None)
    if not late and not (moves and goes_on(engine.run)):
        weights.fill(make())
    sets.add(REFERENCE, weights, moves=moves)


def follow(sets: WeightSets, engine: Engine) -> None:
    """Moves the reference model after an update, if it is due (TRL's `sync_ref_model`). A step that
    was held back has no update and moves nothing: the next move is an interval later. Every rank
    calls it."""
    config = engine.run.section(ReferenceConfig)
    if config.sync_ref_model and engine.scheduler.num_steps % config.ref_model_sync_steps == 0:
        sets.mix(REFERENCE, config.ref_model_mixup_alpha)


def goes_on(run: RunConfig) -> bool:
    """Whether a run loads all of its state from its own checkpoint."""
    return bool(run.checkpoint.load) and not run.checkpoint.finetune


def _teacher(engine: Engine, name: str, folder: str) -> Weights:
    """Returns a teacher's weights. It must be the same model: the student's looks and image tokens,
    drawn anew or left out, would be another teacher than the one that was trained."""
    world = engine.groups.world
    path, stored = sharded.find(engine.groups, folder)
    with raising_together(world, f"teacher {name}: cannot load {folder}"):
        check_model(stored["config"]["model"], engine.run.model, finetune=False)
    return weights_of(engine, str(path))

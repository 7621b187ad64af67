"""The start of a run: from nothing, from a checkpoint to go on from, or from other weights."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mm.checkpoint import sharded
from megatron_mm.checkpoint.collective import raising_together
from megatron_mm.checkpoint.folders import LATEST
from megatron_mm.config import CheckpointConfig, RunConfig, modules_of
from megatron_mm.convert.folder import NOTES
from megatron_mm.convert.live import load_hf
from megatron_mm.convert.token_notes import differing_token
from megatron_mm.engine.engine import Engine
from megatron_mm.errors import CheckpointError, DataError
from megatron_mm.model.layers.cascade import Delegate
from megatron_mm.parallel.groups import Groups
from megatron_mm.train.source import Loader

logger = logging.getLogger(__name__)

SCOPE = "expert_scope"  # the key of `scope_digest` in a checkpoint


@dataclass
class Start:
    """
    Attributes:
        iteration: optimizer steps done.
        seconds: of training, so far.
        notes: of a conversion, for the way back.
        losses: the last ones, for the guard against spikes.
    """

    iteration: int = 0
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)


def resumed(run: RunConfig, groups: Groups) -> RunConfig:
    """Returns the run with `resume` carried out: one with a checkpoint of its own goes on from it.
    Every rank calls it; rank 0 looks, since a shared folder may look different elsewhere for a
    moment."""
    checkpoint = run.checkpoint
    if not checkpoint.resume:
        return run
    assert checkpoint.save is not None  # `resume` is rejected without it
    found = [dist.get_rank() == 0 and (Path(checkpoint.save) / LATEST).is_file()]
    dist.broadcast_object_list(found, src=0, group=groups.world)
    if not found[0]:
        return run
    own = replace(checkpoint, load=checkpoint.save, load_hf=None, finetune=False)
    return replace(run, checkpoint=own)


def loads_weights(checkpoint: CheckpointConfig) -> bool:
    """Whether `start` loads weights, of a run whose `resume` is carried out."""
    return bool(checkpoint.load or checkpoint.load_hf)


def start(
    engine: Engine, loader: Loader, checkpoint: CheckpointConfig, tokens: Mapping[str, Any]
) -> Start:
    """Loads what the settings name into the engine and, to go on, the loader. Every rank calls it.

    Args:
        tokens: `token_notes` of the run's tokenizer.

    Raises:
        CheckpointError: on every rank: before anything has changed, or for another objective's.
    """
    if checkpoint.load_hf:
        found = load_hf(engine, Path(checkpoint.load_hf), tokens)
        _tell(found.initialized, found.ignored, found.narrowed)
        return Start(notes=found.notes)
    if not checkpoint.load:
        return Start()
    state = sharded.load(engine, Path(checkpoint.load), finetune=checkpoint.finetune)
    extra = state["extra"]
    notes, seconds = extra.get(NOTES, {}), extra.get("seconds", 0.0)
    losses = extra.get("losses", [])
    for key, value, kinds in (
        (NOTES, notes, (dict,)),
        ("seconds", seconds, (int, float)),
        ("data", extra.get("data"), (dict, type(None))),
        ("losses", losses, (list,)),
    ):
        if type(value) not in kinds:
            raise CheckpointError(f"{checkpoint.load} is damaged: extra.{key} is {value!r:.80}")
    problem = differing_token(notes, tokens)
    if problem is not None:
        raise CheckpointError(f"cannot load {checkpoint.load}: {problem}")
    if checkpoint.finetune:
        _tell(state["initialized"], state["ignored"], state["narrowed"], state["changed"])
        return Start(notes=notes)
    objective = engine.run.training.objective
    saved = extra.get("objective", "sft")
    if saved != objective:
        raise CheckpointError(
            f"{checkpoint.load} was saved with objective {saved}, this run's is {objective}; set "
            "finetune to begin with its weights, or go on with its own objective"
        )
    _check_scope(extra.get(SCOPE), engine, checkpoint)
    try:
        loader.load_state_dict(state["loader"])
    except DataError:
        raise
    # A forged one makes it fail in many ways; a run's own is checked by its checksum.
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{checkpoint.load} has a position in the data that cannot be read: {error!r}"
        ) from error
    _tell_order(extra.get("data"), loader.order)
    return Start(state["iteration"], seconds, notes, losses)


def scope_digest(engine: Engine) -> str | None:
    """Returns what tells the expert scope of an engine from others; None: it has none."""
    scope = engine.expert_scope
    if scope is None:
        return None
    return hashlib.sha256(scope.cpu().numpy().tobytes()).hexdigest()[:16]


def _check_scope(saved: str | None, engine: Engine, checkpoint: CheckpointConfig) -> None:
    """Raises CheckpointError if experts outside the scope could go on moving by the momentum of
    earlier steps."""
    here = scope_digest(engine)
    if here is not None and saved != here:
        there = "without expert_scope" if saved is None else f"with the expert scope {saved}"
        raise CheckpointError(
            f"{checkpoint.load} was saved {there}, this run's is {here}: experts outside it would "
            "move on by Adam's moments; set finetune, or go on with its own settings"
        )


def tell_frozen(run: RunConfig) -> None:
    """Names the modules that are frozen, if any, and those that learn, adapters among them."""
    built = modules_of(run.model)
    frozen = [module for module in built if not run.trains(module)]
    if not frozen:
        return
    learn = [module for module in built if module not in frozen]
    learn += [f"adapters of {module}" for module in frozen if run.lora.adapts(module)]
    logger.info("frozen: %s; learning: %s", ", ".join(frozen), ", ".join(learn))


def check_second_hops(engine: Engine) -> None:
    """Checks that second hops (letter C) add something, or learn to. Every rank calls it.

    Raises:
        CheckpointError: on every rank; one is new, so its scale is 0, and it is frozen.
    """
    with raising_together(engine.groups.world, "cannot train"):
        for chunk in engine.chunks:
            for name, hop in chunk.named_modules():
                if isinstance(hop, Delegate) and not (hop.scale.requires_grad or hop.scale.any()):
                    raise CheckpointError(
                        f"{name} adds nothing (its scale is 0) and is frozen with the language "
                        "model, so it never will: train letter C first, without adapters and "
                        "freeze_language, or use E"
                    )


def _tell(
    initialized: Sequence[str],
    ignored: Sequence[str],
    narrowed: Sequence[str],
    changed: Sequence[str] = (),
    most: int = 4,
) -> None:
    """Names what a start from other weights drew anew, left out, rounded and sees otherwise."""
    for names, what in (
        (initialized, "new in this model, drawn from the seed"),
        (ignored, "not trained by this model, left out"),
        (narrowed, "stored with more digits than this run computes in, rounded"),
        (changed, "other than in the checkpoint"),
    ):
        if names:
            more = f" and {len(names) - most} more" if len(names) > most else ""
            logger.info("%s: %s%s", what, ", ".join(names[:most]), more)


def _tell_order(saved: dict | None, here: dict) -> None:
    """Warns if the positions in the loader's state now stand for other samples."""
    if saved is None or saved == here:
        return
    what = next(key for key in {**here, **saved} if saved.get(key) != here.get(key))
    logger.warning(
        "the data's order is not the checkpoint's: %s was %s and is %s; samples may be repeated "
        "or left out",
        what,
        json.dumps(saved.get(what)),
        json.dumps(here.get(what)),
    )

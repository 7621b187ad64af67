"""Checks that a checkpoint fits a model: first settings, then names and shapes of all tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_mm.checkpoint.plain_pickle import shown
from megatron_mm.config import (
    ConfigError,
    LoraConfig,
    ModelConfig,
    base_pattern,
    from_dict,
    moved_pairs,
    pair_places,
    to_dict,
)
from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.errors import CheckpointError
from megatron_mm.model.layers.lora import is_adapter

# Settings of initialisation and training. They do not change what a model computes, so they may
# differ between save and load.
NOT_THE_MODEL = {
    "language.init_method_std",
    "language.moe_aux_loss_coeff",
    "language.moe_router_dtype",
    "language.max_position_embeddings",
    "vision.vision_init_method_std",
    "vision.vision_layer_scale_init",
    "layers.C.delegate_price",
    "layers.C.delegate_price_warmup",
    "layers.C.delegate_hard_from",
    "layers.C.delegate_gate_bias",
    "layers.C.delegate_planned_share",
    # The floor of windows is a parameter; these say how it falls.
    "layers.Q.query_first_scale",
    "layers.Q.query_anneal_share",
    "layers.Q.query_box_loss_coeff",
    "layers.Q.max_queries",
}
# Settings of images and sides that a fine-tune may change with the sides kept: what they see, and
# who says where, which the controls are. Others give the same tensors another meaning.
SEEN = ("fusion.image_stream", "fusion.vision_memory", "fusion.memories.", "layers.Q.query_place")
# Order of the tokens that the projector makes, whichever sides there are.
STREAM = "fusion.pixel_shuffle_version"
# Prefix of tensors that no parameter holds (multi-token prediction): kept for the export.
CARRIED_PREFIX = "carried."
# Prefix of the sets of weights that follow the model's (`Engine.moving`).
MOVING_PREFIX = "moving."
# Parameters of side letters and of their memories, which a base model lacks.
SIDES = ("model.language.looks.", "model.language.queries.", "model.vision.memory_proj")
# Likewise of a letter that grew from another one (`LayerKind.grows`).
GROWN = ".inner.delegate."


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}" if path else key)
    else:
        yield path, tree


def _may_change(key: str) -> bool:
    images = key.startswith("fusion.memories.") and key.endswith(".images")
    return key in NOT_THE_MODEL or images


def check_model(stored: dict, model: ModelConfig, *, finetune: bool) -> list[str]:
    """Compares the settings of the stored model with `model`.

    Settings that the checkpoint lacks take their defaults. A fine-tune may add or drop side
    letters (looks and glimpses) with their settings, change what they and the stream see (`SEEN`),
    and take a letter in the place of the one that it grows from, or back.

    Returns:
        "setting was a, is b" of each setting that a fine-tune changes.

    Raises:
        CheckpointError: names the first setting that differs.
    """
    try:
        found = dict(_flat(to_dict(from_dict(ModelConfig, stored, "model"))))
    except ConfigError as error:
        raise CheckpointError(
            f"its run.json describes no model of this version: {shown(error, 1000)}"
        ) from None
    here = dict(_flat(to_dict(model)))
    changed: list[str] = []
    patterns = found["hybrid_layer_pattern"], here["hybrid_layer_pattern"]
    for key in sorted(found.keys() | here.keys()):
        a, b = found.get(key), here.get(key)
        if finetune and key == "hybrid_layer_pattern":
            a, b = base_pattern(found[key]), base_pattern(here[key])
        grown = finetune and key.startswith("layers.") and None in (a, b)
        if grown and LAYERS[key.split(".")[1]].grows:
            continue
        if a == b or _may_change(key):
            continue
        if finetune and _finetune_may_change(key, *patterns):
            changed.append(f"{shown(key)} was {shown(repr(a), 500)}, is {b!r}")
            continue
        raise CheckpointError(
            f"it holds another model: {shown(key)} is {shown(repr(found.get(key, 'absent')), 500)} "
            f"there and {here.get(key, 'absent')!r} here"
        )
    return changed + _moved(*patterns)


def _moved(there: str, here: str) -> list[str]:
    """Returns the pairs of side letters that a fine-tune moves, as many as there are.

    Raises:
        CheckpointError: pairs are added or dropped so that others would take their weights.
    """
    moved = moved_pairs(there, here)
    counts = [{key: len(its) for key, its in pair_places(p).items()} for p in (there, here)]
    if moved and counts[0] != counts[1]:
        raise CheckpointError(
            f"its weights would go to another pair of letters: {moved[0]}; allowed: new pairs "
            "behind those of the checkpoint, or fewer from the end"
        )
    return moved


def _finetune_may_change(key: str, there: str, here: str) -> bool:
    """Whether a fine-tune may change a setting of images or of side letters, between two patterns:
    what is seen, and the form of sides that one of them lacks."""
    sides = LAYERS.of_role("side")
    if key.startswith("layers."):
        letter = key.split(".")[1]
        if letter not in sides:
            return False
        return key.startswith(SEEN) or (letter in there) != (letter in here)
    if not key.startswith("fusion.") or key == STREAM:
        return False
    before, now = ([letter for letter in p if letter in sides] for p in (there, here))
    return key.startswith(SEEN) or before != now or not now


def narrows(stored: torch.dtype, here: torch.dtype) -> bool:
    """Whether numbers lose digits on the way into a parameter."""
    return torch.finfo(stored).eps < torch.finfo(here).eps


def _is_new(key: str) -> bool:
    """Whether a fine-tune may add and drop the parameter."""
    return key.startswith(SIDES) or (key.startswith("model.") and GROWN in key)


def check_adapters(stored: dict, lora: LoraConfig) -> None:
    """Compares rank and alpha, which scale the adapters. `check_tensors` finds which linears have
    adapters.

    Raises:
        CheckpointError: the stored adapters would add something else here.
    """
    try:
        there = from_dict(LoraConfig, stored, "lora")
    except ConfigError as error:
        raise CheckpointError(f"its run.json describes no adapters: {shown(error, 1000)}") from None
    if there.lora_rank is None or lora.lora_rank is None:
        return
    for key in ("lora_rank", "lora_alpha"):
        a, b = getattr(there, key), getattr(lora, key)
        if a != b:
            raise CheckpointError(f"it holds other adapters: {key} is {a} there and {b} here")


def check_tensors(stored: dict, expected: dict, *, finetune: bool) -> list[str]:
    """Compares names and whole shapes of tensors.

    Args:
        stored, expected: key -> whole shape.

    Returns:
        Missing keys that may be missing: those of sides, of letters that grew from another one and
        of adapters, when fine-tuning.

    Raises:
        CheckpointError: tensors are missing, of another shape, or unexpected.
    """
    missing = sorted(expected.keys() - stored.keys())
    added = [key for key in missing if finetune and (_is_new(key) or is_adapter(key))]
    missing = [key for key in missing if key not in set(added)]
    foreign = sorted(stored.keys() - expected.keys())
    if finetune:
        ignored = ("optimizer.", MOVING_PREFIX, CARRIED_PREFIX)
        foreign = [k for k in foreign if not (k.startswith(ignored) or _is_new(k))]
    shared = sorted(stored.keys() & expected.keys())
    misshaped = [key for key in shared if tuple(stored[key]) != tuple(expected[key])]
    words = []
    if missing:
        words.append(f"{len(missing)} tensors are missing (first {missing[0]})")
    if misshaped:
        key = misshaped[0]
        words.append(
            f"{len(misshaped)} have another shape (first {key}: {list(stored[key])} there, "
            f"{list(expected[key])} here)"
        )
    if foreign:
        words.append(f"{len(foreign)} are unexpected (first {foreign[0]})")
    if words:
        hint = ""
        if any(key.startswith("optimizer.") for key in missing + foreign):
            hint = "; optimizer state fits only the same trainable modules, else use finetune"
        if any(key.startswith(MOVING_PREFIX) for key in missing + foreign):
            hint = "; set sync_ref_model and the reference as there, else use finetune"
        # Dropping them would silently load another model than the one that was trained.
        adapters = [key for key in foreign if key.startswith("model.") and is_adapter(key)]
        if adapters:
            hint = (
                f"; {len(adapters)} of them (first {adapters[0]}) are LoRA's: "
                "set lora_rank and lora_targets as there, or merge them first (tools/merge_lora.py)"
            )
        raise CheckpointError(f"of {len(expected)} tensors expected, {'; '.join(words)}{hint}")
    return added

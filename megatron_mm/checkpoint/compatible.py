"""Whether a checkpoint fits a model: settings first, then every tensor's name and shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_mm.config import (
    ConfigError,
    LoraConfig,
    ModelConfig,
    from_dict,
    to_dict,
    without_clvr,
)
from megatron_mm.errors import CheckpointError
from megatron_mm.model.layers.lora import is_adapter

# How a model starts or trains, not what it computes: may change between save and load.
NOT_THE_MODEL = {
    "language.init_method_std",
    "language.moe_aux_loss_coeff",
    "language.moe_router_dtype",
    "language.max_position_embeddings",
    "vision.vision_init_method_std",
    "vision.vision_layer_scale_init",
}
# Tensors of a converted folder that no parameter holds (multi-token prediction): kept beside the
# model for the way back.
CARRIED_PREFIX = "carried."
# CLVR's own parameters: what a base model does not have.
CLVR = ("model.language.looks.", "model.vision.memory_proj")


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}" if path else key)
    else:
        yield path, tree


def _may_change(key: str) -> bool:
    images = key.startswith("fusion.memories.") and key.endswith(".images")
    return key in NOT_THE_MODEL or images


def check_model(stored: dict, model: ModelConfig, *, finetune: bool) -> None:
    """Raises CheckpointError naming the first setting of the model that differs.

    Settings that this version has and the checkpoint lacks take their defaults. A fine-tune
    may add or drop looks (letters L and J) and change how images enter (fusion).
    """
    try:
        found = dict(_flat(to_dict(from_dict(ModelConfig, stored, "model"))))
    except ConfigError as error:
        raise CheckpointError(f"its run.json describes no model of this version: {error}") from None
    ours = dict(_flat(to_dict(model)))
    for key in sorted(found.keys() | ours.keys()):
        a, b = found.get(key), ours.get(key)
        if finetune and key == "hybrid_layer_pattern":
            a, b = without_clvr(a), without_clvr(b)
        if a == b or _may_change(key) or (finetune and key.startswith("fusion.")):
            continue
        raise CheckpointError(
            f"it holds another model: {key} is {found.get(key, 'absent')!r} there and "
            f"{ours.get(key, 'absent')!r} here"
        )


def check_adapters(stored: dict, lora: LoraConfig) -> None:
    """Raises CheckpointError if adapters there would add something else here: rank and alpha
    scale them. Whether there are any, and beside which linears, the tensors say."""
    try:
        there = from_dict(LoraConfig, stored, "lora")
    except ConfigError as error:
        raise CheckpointError(f"its run.json describes no adapters: {error}") from None
    if there.lora_rank is None or lora.lora_rank is None:
        return
    for key in ("lora_rank", "lora_alpha"):
        a, b = getattr(there, key), getattr(lora, key)
        if a != b:
            raise CheckpointError(f"it holds other adapters: {key} is {a} there and {b} here")


def check_tensors(stored: dict, expected: dict, *, finetune: bool) -> list[str]:
    """Compare key -> whole shape.

    Returns:
        Keys that the checkpoint lacks and may lack: CLVR's and adapters', when fine-tuning.

    Raises:
        CheckpointError: tensors are missing, of another shape, or foreign.
    """
    missing = sorted(expected.keys() - stored.keys())
    added = [key for key in missing if finetune and (key.startswith(CLVR) or is_adapter(key))]
    missing = [key for key in missing if key not in set(added)]
    foreign = sorted(stored.keys() - expected.keys())
    if finetune:
        ignored = ("optimizer.", CARRIED_PREFIX, *CLVR)
        foreign = [key for key in foreign if not key.startswith(ignored)]
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
        # Without them it would be another model than the one that was trained.
        adapters = [key for key in foreign if key.startswith("model.") and is_adapter(key)]
        if adapters:
            hint = (
                f"; {len(adapters)} of them (first {adapters[0]}) are LoRA's: "
                "set lora_rank and lora_targets as there, or merge them first (tools/merge_lora.py)"
            )
        raise CheckpointError(f"of {len(expected)} tensors expected, {'; '.join(words)}{hint}")
    return added

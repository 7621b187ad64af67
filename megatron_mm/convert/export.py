"""Small files of an exported folder: config.json and the code of a model with looks or glimpses,
beside those of export_inputs.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_mm.config import (
    ConfigError,
    ModelConfig,
    look_memories,
    memories,
    to_dict,
    to_transformers_dict,
    without_clvr,
)
from megatron_mm.config.families import language_family, vision_family
from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.config.layers.queries import query_settings
from megatron_mm.convert.export_inputs import (
    AUTO_PROCESSOR,
    REMOTE,
    as_json,
    has_code,
    input_files,
)
from megatron_mm.convert.folder import CLVR_KEY, CONFIG, IMAGE_CONTEXT, look_names, tokenizer_id
from megatron_mm.errors import ConvertError

CODE = (
    "configuration_clvr.py",
    "modeling_clvr.py",
    "modeling_look.py",
    "modeling_glimpse.py",
    "modeling_delegate.py",
)
EXPORTED_PLACES = ("hidden", "tokens")  # who may say where a query looks


def small_files(
    checkpoint: Any,
    assets: Sequence[Path],
    tied: bool,
    dtypes: Mapping[torch.dtype, int],
    lines: list[str],
) -> dict[str, bytes]:
    """Returns name -> content of every file beside the tensors. Appends notes to `lines`.

    Args:
        dtypes: the number of elements of each dtype.

    Raises:
        ConvertError: transformers cannot compute the model, or a token that it needs is unknown.
    """
    files = input_files(checkpoint, assets, lines)
    config = model_config(checkpoint, assets, tied)
    config["dtype"] = config_dtype(dtypes)
    if has_code(checkpoint.model):
        _check_code(checkpoint.model, checkpoint.run.data.memory_images)
        files |= {name: (REMOTE / name).read_bytes() for name in CODE}
        config |= clvr_config(checkpoint.model, look_ids(checkpoint, assets))
    return files | {CONFIG: as_json(config)}


def _check_code(model: ModelConfig, images: str) -> None:
    """Raises ConvertError for a second hop, glimpses or images of a memory that the code of an
    export does not compute."""
    asking = query_settings(model)
    if asking is not None and asking.query_place not in EXPORTED_PLACES:
        raise ConvertError(
            f"query_place is {asking.query_place}, a control that is not exported; allowed: "
            f"{' or '.join(EXPORTED_PLACES)}"
        )
    for memory in memories(model, images):
        if memory.images != "images":
            raise ConvertError(
                f"{memory.images_setting} is {memory.images}, a control that is not exported: its "
                "memory holds other images than the prompt's; allowed: images"
            )
    second = model.layers.get("C")
    if second is None:
        return
    if model.vision is None:
        raise ConvertError(
            f"it has letter C (pattern {model.hybrid_layer_pattern}) and no vision model, whose "
            "export alone carries code for it; allowed: a fused model, or a pattern with E"
        )
    if second.delegate_random_share is not None:
        raise ConvertError(
            f"delegate_random_share is {second.delegate_random_share}, a control that is not "
            "exported; allowed: none"
        )


def config_dtype(dtypes: Mapping[torch.dtype, int]) -> str:
    """Returns the dtype that config.json gives, in which transformers loads the whole model: that
    of most elements."""
    most = max(dtypes, key=lambda dtype: (dtypes[dtype], dtype.itemsize))
    return str(most).removeprefix("torch.")


def clvr_config(model: ModelConfig, look_ids: Sequence[int] | None) -> dict[str, Any]:
    """Returns the entries of config.json for looks and glimpses and the remote code that computes
    them."""
    sides = LAYERS.of_role("side")
    layers = {letter: values for letter, values in model.layers.items() if letter in sides}
    return {
        "model_type": "internvl_clvr",
        "architectures": ["CLVRForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_clvr.CLVRConfig",
            "AutoModelForImageTextToText": "modeling_clvr.CLVRForConditionalGeneration",
            "AutoProcessor": AUTO_PROCESSOR,
        },
        CLVR_KEY: {
            "hybrid_layer_pattern": model.hybrid_layer_pattern,
            "fusion": to_dict(model.fusion),
            "memories": [
                {"name": m.name, "width": m.width, "coordinates": m.coordinates}
                for m in memories(model)
            ],
            "look_memories": [memory.name for memory in look_memories(model)],
            "layers": {letter: to_dict(values) for letter, values in layers.items()},
            **dict(zip(look_names(model), look_ids or (), strict=True)),
        },
    }


def look_ids(checkpoint: Any, assets: Sequence[Path]) -> Sequence[int] | None:
    """Returns the ids of the tokens of looks; None for a model without glimpses.

    Raises:
        ConvertError: they are unknown, or the tokenizer has others.
    """
    names = [*look_names(checkpoint.model).values()]
    if not names:
        return None
    noted: Sequence[int] | None = checkpoint.notes.get("look_ids")
    there = [tokenizer_id(assets[0].parent, token) for token in names] if assets else []
    found = [index for index in there if index is not None]
    if len(found) < len(names):
        found = []
    called = " and ".join(names)
    if noted and found and list(noted) != found:
        raise ConvertError(
            f"{assets[0].parent}: {called} are {found} in the tokenizer, {list(noted)} in the "
            "checkpoint"
        )
    if len(found or noted or ()) != len(names):
        raise ConvertError(
            f"{checkpoint.path} does not say which tokens are {called}: name the folder of a "
            "tokenizer that has them with --assets"
        )
    return found or noted


def model_config(checkpoint: Any, assets: Iterable[Path], tied: bool) -> dict[str, Any]:
    """Returns config.json as transformers' config class writes it."""
    import transformers  # seconds to import

    model = checkpoint.model
    family = language_family(model) if model.vision is None else vision_family(model)
    base = replace(model, hybrid_layer_pattern=without_clvr(model.hybrid_layer_pattern))
    base.language = replace(base.language, untie_embeddings_and_output_weights=not tied)
    image = None if model.vision is None else _image_token(checkpoint, list(assets))
    try:
        words = to_transformers_dict(base, image)
    except ConfigError as error:
        raise ConvertError(f"{checkpoint.path}: {error}") from None
    words.pop("model_type")
    config_class, model_class = family.hf_classes
    made = getattr(transformers, config_class)(**words).to_diff_dict()
    made["architectures"] = [model_class]
    made["tie_word_embeddings"] = tied  # written even where it equals a default
    return made


def _image_token(checkpoint: Any, assets: list[Path]) -> int:
    noted = checkpoint.notes.get("image_token_id")
    found = tokenizer_id(assets[0].parent, IMAGE_CONTEXT) if assets else None
    if noted is not None and found is not None and noted != found:
        raise ConvertError(
            f"{assets[0].parent}: {IMAGE_CONTEXT} is {found} in the tokenizer, {noted} in the "
            "checkpoint"
        )
    image = noted if found is None else found
    if image is None:
        raise ConvertError(
            f"{checkpoint.path} does not say which token is {IMAGE_CONTEXT}: name the tokenizer's "
            "folder with --assets"
        )
    return image

"""Small files of an exported folder: config, tokenizer, remote code."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from megatron_mm.config import (
    ConfigError,
    ModelConfig,
    RunConfig,
    look_memories,
    memories,
    read_memories,
    to_dict,
    to_transformers_dict,
    without_clvr,
)
from megatron_mm.config.families import language_family, vision_family
from megatron_mm.convert.folder import CLVR_KEY, CONFIG, IMAGE_CONTEXT, tokenizer_id
from megatron_mm.data.tiles import image_settings
from megatron_mm.errors import ConvertError

REMOTE = Path(__file__).parent / "remote"
CODE = ("configuration_clvr.py", "modeling_clvr.py", "processing_clvr.py")
TEMPLATE, PROCESSOR = "chat_template.jinja", "processor_config.json"


def has_clvr(model: ModelConfig) -> bool:
    """Whether the model computes looks: the pattern has one and there is a memory."""
    return bool(read_memories(model))


def small_files(
    checkpoint: Any,
    assets: Iterable[Path],
    tied: bool,
    dtypes: set[torch.dtype],
    lines: list[str],
) -> dict[str, bytes]:
    """Returns name -> content of every file beside the tensors. Appends notes to `lines`.

    Raises:
        ConvertError: transformers cannot compute the model, or the image token is unknown.
    """
    files = {path.name: path.read_bytes() for path in assets}
    config = model_config(checkpoint, assets, tied)
    config["dtype"] = str(max(dtypes, key=lambda d: d.itemsize)).removeprefix("torch.")
    if has_clvr(checkpoint.model):
        files |= {name: (REMOTE / name).read_bytes() for name in CODE}
        if not any(name.startswith("chat_template") for name in files):
            files[TEMPLATE] = (REMOTE / TEMPLATE).read_bytes()
        files[PROCESSOR] = _json(processor_config(checkpoint.run))
        config |= clvr_config(checkpoint.model)
    if not any(name.startswith("tokenizer") for name in files):
        lines.append("no tokenizer travelled along: name its folder with --assets")
    files[CONFIG] = _json(config)
    return files


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def clvr_config(model: ModelConfig) -> dict[str, Any]:
    """Returns the entries of config.json for CLVR and the remote code that computes it."""
    return {
        "model_type": "internvl_clvr",
        "architectures": ["CLVRForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_clvr.CLVRConfig",
            "AutoModelForImageTextToText": "modeling_clvr.CLVRForConditionalGeneration",
            "AutoProcessor": "processing_clvr.CLVRProcessor",
        },
        CLVR_KEY: {
            "hybrid_layer_pattern": model.hybrid_layer_pattern,
            "fusion": to_dict(model.fusion),
            "memories": [
                {"name": m.name, "width": m.width, "coordinates": m.coordinates}
                for m in memories(model)
            ],
            "look_memories": [memory.name for memory in look_memories(model)],
        },
    }


def processor_config(run: RunConfig) -> dict[str, Any]:
    """Returns processor_config.json: how images were tiled in training."""
    settings = image_settings(run)
    assert settings is not None  # a model with looks has a vision encoder
    return {
        "processor_class": "CLVRProcessor",
        "auto_map": {"AutoProcessor": "processing_clvr.CLVRProcessor"},
        "tiles": asdict(settings) | {"tokens_per_tile": settings.tokens_per_tile},
    }


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

"""A model as the keyword dict of its transformers config class, and back. Imports no torch.

The families write and read their own parts. transformers has no words for CLVR, for which tiles
enter the stream, or for the router's dtype: those are lost on the way out and defaults on the way
in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_mm.config.families import (
    LANGUAGE_FAMILIES,
    VISION_FAMILIES,
    language_family,
    vision_family,
)
from megatron_mm.config.settings_model import ModelConfig
from megatron_mm.errors import ConfigError


def to_transformers_dict(model: ModelConfig, image_token_id: int | None = None) -> dict[str, Any]:
    """The keywords of the fused config class, or of the text model's when `model.vision` is None.

    `image_token_id` is the tokenizer's id of the image context token. A fused model needs it:
    transformers' default, 151667, is `<think>` in Qwen3's vocabulary. Looks and injections are left
    out: the dict is the base model.

    Raises:
        ConfigError: when transformers could not compute this model.
    """
    text = language_family(model).to_hf(model)
    if model.vision is None:
        return text
    vocab = model.language.vocab_size
    if image_token_id is None or not 0 <= image_token_id < vocab:
        raise ConfigError(f"image_token_id is {image_token_id}; allowed: 0 to {vocab - 1}")
    return vision_family(model).to_hf(model, text, image_token_id)


def from_transformers_dict(config: Mapping[str, Any]) -> ModelConfig:
    """The model that a transformers config.json describes.

    An absent key means the default of the transformers class, a key we know nothing of is
    ignored, and a known key with a value that our layers cannot compute raises ConfigError.
    """
    fused = {family.hf_type: family for _, family in VISION_FAMILIES.items()}
    found = config.get("model_type")
    if "text_config" not in config and found not in fused:
        return read_text(config, "", bool(config.get("tie_word_embeddings", False)))
    family = fused.get(next(iter(fused)) if found is None else found)
    if family is None:
        allowed = ", ".join(map(repr, fused))
        raise ConfigError(f"model_type is {found!r}; allowed: {allowed}")
    return family.from_hf(config)


def read_text(config: Mapping[str, Any], where: str, tied: bool) -> ModelConfig:
    """The text-only model of a text config at the dotted place `where`.

    Args:
        tied: whether the output layer is the embedding, which the outer config decides.
    """
    families = {family.hf_type: family for _, family in LANGUAGE_FAMILIES.items()}
    found = config.get("model_type")
    if found not in families:
        allowed = ", ".join(map(repr, families))
        raise ConfigError(f"{where}model_type is {found!r}; allowed: {allowed}")
    return families[found].from_hf(config, where, tied)


def fused_type(vision: Mapping[str, Any]) -> str:
    """`model_type` of the fused model around the encoder of this transformers config."""
    families = {family.hf_encoder_type: family for _, family in VISION_FAMILIES.items()}
    found = vision.get("model_type", next(iter(families)))
    if found not in families:
        allowed = ", ".join(map(repr, families))
        raise ConfigError(f"vision_config.model_type is {found!r}; allowed: {allowed}")
    return families[found].hf_type


def in_transformers_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """A published config.json as transformers would write it; one that already is comes back as it
    is.

    Raises:
        ConfigError: for what a release can say and transformers' model cannot.
    """
    for registry in (LANGUAGE_FAMILIES, VISION_FAMILIES):
        for _, family in registry.items():
            config = family.released(config)
    return dict(config)

"""InternViT, and InternVL around it, in transformers' words and in those of the releases.

The fused model is an InternVLConfig around any text config. Published folders
(`OpenGVLab/InternVL*`, `OpenGVLab/InternViT-*`) have configs of their own remote code:
`internvl_chat` with `llm_config` and `vision_config`, and `intern_vit_6b`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from megatron_mm.config.hf import read_text
from megatron_mm.config.hf_words import Table, demand, renamed, written
from megatron_mm.config.settings_model import FusionConfig, ModelConfig
from megatron_mm.config.tree import from_dict
from megatron_mm.errors import ConfigError
from megatron_mm.model.families.internvit.settings import InternViTSettings

FUSED_TYPE, ENCODER_TYPE = "internvl", "internvl_vision"
# transformers key, our field, default of the transformers class
VISION: Table = (
    ("num_hidden_layers", "vision_num_layers", 24),
    ("hidden_size", "vision_hidden_size", 1024),
    ("intermediate_size", "vision_ffn_hidden_size", 4096),
    ("num_attention_heads", "vision_num_attention_heads", 16),
    ("layer_norm_eps", "vision_layernorm_epsilon", 1e-6),
    ("attention_bias", "vision_add_qkv_bias", False),
    ("use_qk_norm", "vision_qk_layernorm", False),
    ("layer_scale_init_value", "vision_layer_scale_init", 0.1),
    ("initializer_range", "vision_init_method_std", 0.02),
)
# What our layers do and no setting changes: written out, and demanded on the way in.
VISION_FIXED = {
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_dropout": 0.0,
    "projection_dropout": 0.0,
    "num_channels": 3,
    "use_mask_token": False,
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": True,  # in transformers' words: no norm after the last layer
}
FUSED_FIXED = {
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}
NORM_NAMES = {"LayerNorm": "layer_norm", "RMSNorm": "rms_norm"}
# key of the release, of transformers, default of the release's class
RELEASED = (
    ("num_hidden_layers", "num_hidden_layers", 48),
    ("hidden_size", "hidden_size", 3200),
    ("intermediate_size", "intermediate_size", 12800),
    ("num_attention_heads", "num_attention_heads", 25),
    ("layer_norm_eps", "layer_norm_eps", 1e-6),
    ("qkv_bias", "attention_bias", False),
    ("qk_normalization", "use_qk_norm", True),
    ("norm_type", "norm_type", "rms_norm"),
    ("image_size", "image_size", 224),
    ("patch_size", "patch_size", 14),
    ("hidden_act", "hidden_act", "gelu"),
    ("initializer_factor", "layer_scale_init_value", 0.1),
    ("initializer_range", "initializer_range", 0.02),
)


def to_hf(model: ModelConfig, text: dict[str, Any], image_token_id: int) -> dict[str, Any]:
    """Keywords of InternVLConfig.

    Raises:
        ConfigError: when transformers could not compute this model.
    """
    fusion, vision = model.fusion, cast(InternViTSettings, model.vision)
    if fusion.pixel_shuffle_version != "v2":
        raise ConfigError(
            f"pixel_shuffle_version is {fusion.pixel_shuffle_version}; allowed: v2, "
            f"the only one transformers has"
        )
    patches, factor = vision.image_size // vision.patch_size, fusion.pixel_shuffle_factor
    if patches % (1 / factor) != 0:  # as transformers asks, in floating point
        raise ConfigError(
            f"pixel_shuffle_factor is {factor}: transformers computes {patches} % (1 / {factor}) "
            f"= {patches % (1 / factor):.1e} and takes {patches} patches a side for no multiple; "
            "allowed: a power of two"
        )
    side = patches // factor
    return {
        "model_type": FUSED_TYPE,
        "text_config": text,
        "vision_config": _vision(vision),
        "image_token_id": image_token_id,
        "image_seq_length": side * side,
        "downsample_ratio": 1 / factor,
        "tie_word_embeddings": text["tie_word_embeddings"],  # the class would say True
        **FUSED_FIXED,
    }


def _vision(vit: InternViTSettings) -> dict[str, Any]:
    return {
        "model_type": ENCODER_TYPE,
        "norm_type": NORM_NAMES[vit.vision_normalization],
        "image_size": [vit.image_size, vit.image_size],
        "patch_size": [vit.patch_size, vit.patch_size],
        **written(vit, VISION, VISION_FIXED),
    }


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The model that an InternVLConfig describes."""
    demand(config, {"model_type": FUSED_TYPE, **FUSED_FIXED}, "")
    # transformers ties by the outer flag, whatever the text config says.
    tied = bool(config.get("tie_word_embeddings", True))
    model = read_text(config.get("text_config") or {}, "text_config.", tied)
    model.vision = _read_vision(config.get("vision_config") or {})
    ratio = config.get("downsample_ratio", 0.5)
    factor = round(1 / ratio) if ratio > 0 else 0
    if factor < 1 or 1 / factor != ratio:
        raise ConfigError(f"downsample_ratio is {ratio}; allowed: 1, 1/2, 1/3, ...")
    model.fusion = FusionConfig(pixel_shuffle_factor=factor)
    return model


def _read_vision(config: Mapping[str, Any]) -> InternViTSettings:
    demand(config, {"model_type": ENCODER_TYPE, **VISION_FIXED}, "vision_config.")
    values = renamed(config, VISION)
    for key, default in (("image_size", 448), ("patch_size", 14)):
        size = config.get(key, default)
        sides = size if isinstance(size, (list, tuple)) else [size]
        if len(set(sides)) != 1:
            raise ConfigError(f"vision_config.{key} is {size}; allowed: a square")
        values[key] = sides[0]
    norms = {name: ours for ours, name in NORM_NAMES.items()}
    norm = config.get("norm_type", "layer_norm")
    if norm not in norms:
        raise ConfigError(f"vision_config.norm_type is {norm!r}; allowed: {', '.join(norms)}")
    values["vision_normalization"] = norms[norm]
    return from_dict(InternViTSettings, values, "vision_config")


def released(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config of InternVL's or InternViT's release in transformers' words; any other as it is.

    Raises:
        ConfigError: for what a release can say and transformers' model cannot.
    """
    kind = config.get("model_type")
    if kind == "intern_vit_6b":
        return _released_vision(config)
    if kind != "internvl_chat":
        return config
    text, vision = config.get("llm_config"), config.get("vision_config")
    if not isinstance(text, Mapping) or not isinstance(vision, Mapping):
        raise ConfigError("config.json has no llm_config or no vision_config; allowed: both")
    # With the defaults of the release's class.
    for key, value, default in (("ps_version", "v2", "v1"), ("select_layer", -1, -1)):
        found = config.get(key, default)
        if found != value:
            raise ConfigError(f"{key} is {found!r}; allowed: {value!r}")
    made = {
        "model_type": FUSED_TYPE,
        "text_config": dict(text),
        "vision_config": _released_vision(vision),
        "downsample_ratio": config.get("downsample_ratio", 0.5),
        "tie_word_embeddings": bool(
            text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
        ),
    }
    if "img_context_token_id" in config:
        made["image_token_id"] = config["img_context_token_id"]
    return made


def _released_vision(config: Mapping[str, Any]) -> dict[str, Any]:
    """A vision config, whoever wrote it."""
    if config.get("model_type") not in ("intern_vit_6b", None):
        return dict(config)
    made = {name: config.get(key, default) for key, name, default in RELEASED}
    return {"model_type": ENCODER_TYPE, **made}

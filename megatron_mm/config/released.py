"""config.json as InternVL's and InternViT's releases write it, in transformers' words.

Published folders (`OpenGVLab/InternVL*`, `OpenGVLab/InternViT-*`) have configs of their own
remote code: `internvl_chat` with `llm_config` and `vision_config`, and `intern_vit_6b`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_mm.errors import ConfigError

# key of the release, of transformers, default of the release's class
VISION = (
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


def in_transformers_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config as transformers would write it; one that already is comes back as it is.

    Raises ConfigError for what a release can say and transformers' model cannot.
    """
    kind = config.get("model_type")
    if kind == "intern_vit_6b":
        return vision_in_transformers_words(config)
    if kind != "internvl_chat":
        return dict(config)
    text, vision = config.get("llm_config"), config.get("vision_config")
    if not isinstance(text, Mapping) or not isinstance(vision, Mapping):
        raise ConfigError("config.json has no llm_config or no vision_config; allowed: both")
    for key, value in (("ps_version", "v2"), ("select_layer", -1)):
        if config.get(key, value) != value:
            raise ConfigError(f"{key} is {config[key]!r}; allowed: {value!r}")
    made = {
        "model_type": "internvl",
        "text_config": dict(text),
        "vision_config": vision_in_transformers_words(vision),
        "downsample_ratio": config.get("downsample_ratio", 0.5),
        "tie_word_embeddings": bool(
            text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
        ),
    }
    if "img_context_token_id" in config:
        made["image_token_id"] = config["img_context_token_id"]
    return made


def vision_in_transformers_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a vision config, whoever wrote it."""
    if config.get("model_type") not in ("intern_vit_6b", None):
        return dict(config)
    made = {theirs: config.get(key, default) for key, theirs, default in VISION}
    return {"model_type": "internvl_vision", **made}

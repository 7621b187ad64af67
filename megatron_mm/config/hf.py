"""A model as the keyword dict of its transformers config class, and back. Imports no torch.

A fused model is an `InternVLConfig` whose text model is Qwen3-Next; a text-only model is a
`Qwen3NextConfig`. transformers has no words for CLVR, for which tiles enter the stream, or
for the router's dtype: those are lost on the way out and defaults on the way in.

The last column of each table is the default of the transformers class, because a saved
config.json may leave out what equals it. It is not always what was published: the 80B
checkpoint has max_position_embeddings 262144 (class: 32768) and rope_theta 1e7 (class: 1e4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mm.config.pattern import parse_pattern
from megatron_mm.config.settings import FusionConfig, LanguageConfig, ModelConfig, VisionConfig
from megatron_mm.config.tree import from_dict
from megatron_mm.errors import ConfigError

Table = Sequence[tuple[str, str, Any]]

# transformers key, our field, default of the transformers class
TEXT: Table = (
    ("vocab_size", "vocab_size", 151936),
    ("hidden_size", "hidden_size", 2048),
    ("rms_norm_eps", "layernorm_epsilon", 1e-6),
    ("initializer_range", "init_method_std", 0.02),
    ("max_position_embeddings", "max_position_embeddings", 32768),
    ("num_attention_heads", "num_attention_heads", 16),
    ("num_key_value_heads", "num_query_groups", 2),
    ("head_dim", "kv_channels", 256),
    ("linear_conv_kernel_dim", "linear_conv_kernel_dim", 4),
    ("linear_key_head_dim", "linear_key_head_dim", 128),
    ("linear_value_head_dim", "linear_value_head_dim", 128),
    ("linear_num_key_heads", "linear_num_key_heads", 16),
    ("linear_num_value_heads", "linear_num_value_heads", 32),
    ("num_experts", "num_experts", 512),
    ("num_experts_per_tok", "moe_router_topk", 10),
    ("moe_intermediate_size", "moe_ffn_hidden_size", 512),
    ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", 512),
    ("router_aux_loss_coef", "moe_aux_loss_coeff", 0.001),
)
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
# What our layers do and no setting of ours changes: written out, and demanded on the way in.
TEXT_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
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
MIXER_NAMES = {"G": "linear_attention", "*": "full_attention"}
NORM_NAMES = {"LayerNorm": "layer_norm", "RMSNorm": "rms_norm"}


def to_transformers_dict(model: ModelConfig, image_token_id: int | None = None) -> dict[str, Any]:
    """The keywords of InternVLConfig, or of Qwen3NextConfig when `model.vision` is None.

    `image_token_id` is the tokenizer's id of the image context token. A fused model needs
    it: transformers' default, 151667, is `<think>` in Qwen3's vocabulary. Looks and injects
    are left out: the dict is the base model.

    Raises ConfigError when transformers could not compute this model.
    """
    text = _text(model)
    if model.vision is None:
        return text
    vocab, fusion = model.language.vocab_size, model.fusion
    if image_token_id is None or not 0 <= image_token_id < vocab:
        raise ConfigError(f"image_token_id is {image_token_id}; allowed: 0 to {vocab - 1}")
    if fusion.pixel_shuffle_version != "v2":
        raise ConfigError(
            f"pixel_shuffle_version is {fusion.pixel_shuffle_version}; allowed: v2, "
            f"the only one transformers has"
        )
    side = model.vision.image_size // model.vision.patch_size // fusion.pixel_shuffle_factor
    return {
        "model_type": "internvl",
        "text_config": text,
        "vision_config": _vision(model.vision),
        "image_token_id": image_token_id,
        "image_seq_length": side * side,
        "downsample_ratio": 1 / fusion.pixel_shuffle_factor,
        "tie_word_embeddings": text["tie_word_embeddings"],  # the class would say True
        **FUSED_FIXED,
    }


def _text(model: ModelConfig) -> dict[str, Any]:
    lm = model.language
    layers = parse_pattern(model.hybrid_layer_pattern)
    kinds = [MIXER_NAMES[layer.kind] for layer in layers if layer.kind in MIXER_NAMES]
    return {
        "model_type": "qwen3_next",
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "tie_word_embeddings": not lm.untie_embeddings_and_output_weights,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": lm.rotary_base,
            "partial_rotary_factor": lm.rotary_percent,
        },
        **{key: getattr(lm, name) for key, name, _ in TEXT},
        **{key: _copy(value) for key, value in TEXT_FIXED.items()},
    }


def _vision(vit: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": "internvl_vision",
        "norm_type": NORM_NAMES[vit.vision_normalization],
        "image_size": [vit.image_size, vit.image_size],
        "patch_size": [vit.patch_size, vit.patch_size],
        **{key: getattr(vit, name) for key, name, _ in VISION},
        **VISION_FIXED,
    }


def _copy(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def from_transformers_dict(config: Mapping[str, Any]) -> ModelConfig:
    """The model that a transformers config.json describes (InternVL or Qwen3-Next).

    An absent key means the default of the transformers class, a key we know nothing of is
    ignored, and a known key with a value that our layers cannot compute raises ConfigError.
    """
    fused = "text_config" in config or config.get("model_type") == "internvl"
    if not fused:
        return _read_text(config, "", bool(config.get("tie_word_embeddings", False)))
    _demand(config, {"model_type": "internvl", **FUSED_FIXED}, "")
    # transformers ties by the outer flag, whatever the text config says.
    tied = bool(config.get("tie_word_embeddings", True))
    model = _read_text(config.get("text_config") or {}, "text_config.", tied)
    model.vision = _read_vision(config.get("vision_config") or {})
    ratio = config.get("downsample_ratio", 0.5)
    factor = round(1 / ratio) if ratio > 0 else 0
    if factor < 1 or 1 / factor != ratio:
        raise ConfigError(f"downsample_ratio is {ratio}; allowed: 1, 1/2, 1/3, ...")
    model.fusion = FusionConfig(pixel_shuffle_factor=factor)
    return model


def _demand(config: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    for key, value in fixed.items():
        found = config.get(key, value)
        if (found or value) and found != value:  # None and [] both mean "no such layers"
            raise ConfigError(f"{where}{key} is {found!r}; allowed: {value!r}")


def _renamed(config: Mapping[str, Any], table: Table) -> dict[str, Any]:
    return {name: config.get(key, default) for key, name, default in table}


def _read_text(config: Mapping[str, Any], where: str, tied: bool) -> ModelConfig:
    if config.get("model_type") != "qwen3_next":
        found = config.get("model_type")
        raise ConfigError(f"{where}model_type is {found!r}; allowed: 'qwen3_next'")
    _demand(config, TEXT_FIXED, where)
    values = _renamed(config, TEXT)
    values["untie_embeddings_and_output_weights"] = not tied
    # Older files keep the two numbers beside an empty rope_scaling.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for key, value in rope.items():
        known = key in ("rope_theta", "partial_rotary_factor")
        if not known and (key not in ("rope_type", "type") or value != "default"):
            raise ConfigError(f"{where}rope {key} is {value!r}; allowed: rope_type 'default'")
    for key, name, default in (
        ("rope_theta", "rotary_base", 10_000.0),
        ("partial_rotary_factor", "rotary_percent", 0.25),
    ):
        values[name] = rope.get(key, config.get(key, default))
    language = from_dict(LanguageConfig, values, where.rstrip(".") or "config")
    return ModelConfig(_read_pattern(config, where), language, vision=None)


def _read_pattern(config: Mapping[str, Any], where: str) -> str:
    count, types = config.get("num_hidden_layers", 48), config.get("layer_types")
    if types is None:
        every = config.get("full_attention_interval", 4)
        types = [MIXER_NAMES["G" if (i + 1) % every else "*"] for i in range(count)]
    if len(types) != count:
        raise ConfigError(f"{where}num_hidden_layers is {count}; allowed: {len(types)} layer_types")
    letters = {name: letter for letter, name in MIXER_NAMES.items()}
    for kind in types:
        if kind not in letters:
            raise ConfigError(f"{where}layer_types has {kind!r}; allowed: {', '.join(letters)}")
    return "".join(letters[kind] + "E" for kind in types)


def _read_vision(config: Mapping[str, Any]) -> VisionConfig:
    _demand(config, {"model_type": "internvl_vision", **VISION_FIXED}, "vision_config.")
    values = _renamed(config, VISION)
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
    return from_dict(VisionConfig, values, "vision_config")

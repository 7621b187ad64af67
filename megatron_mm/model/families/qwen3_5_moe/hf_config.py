"""Qwen3.5-MoE's text model in transformers' words (Qwen3_5MoeTextConfig)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_mm.config.hf_words import Table, TextWords
from megatron_mm.errors import ConfigError
from megatron_mm.model.families.qwen3_5_moe.settings import Qwen35MoeSettings

# transformers key, our field, default of the transformers class
TEXT: Table = (
    ("vocab_size", "vocab_size", 248320),
    ("hidden_size", "hidden_size", 2048),
    ("rms_norm_eps", "layernorm_epsilon", 1e-6),
    ("initializer_range", "init_method_std", 0.02),
    ("max_position_embeddings", "max_position_embeddings", 32768),  # published: 262144
    ("num_attention_heads", "num_attention_heads", 16),
    ("num_key_value_heads", "num_query_groups", 2),
    ("head_dim", "kv_channels", 256),
    ("linear_conv_kernel_dim", "linear_conv_kernel_dim", 4),
    ("linear_key_head_dim", "linear_key_head_dim", 128),
    ("linear_value_head_dim", "linear_value_head_dim", 128),
    ("linear_num_key_heads", "linear_num_key_heads", 16),
    ("linear_num_value_heads", "linear_num_value_heads", 32),
    ("num_experts", "num_experts", 256),
    ("num_experts_per_tok", "moe_router_topk", 8),
    ("moe_intermediate_size", "moe_ffn_hidden_size", 512),
    ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", 512),
    ("router_aux_loss_coef", "moe_aux_loss_coeff", 0.001),
)
ROPE: Table = (
    ("rope_theta", "rotary_base", 10_000.0),  # published: 1e7
    ("partial_rotary_factor", "rotary_percent", 0.25),
    ("mrope_section", "mrope_section", [11, 11, 10]),
)
WORDS = TextWords(
    "qwen3_5_moe_text",
    Qwen35MoeSettings,
    TEXT,
    ROPE,
    layers=40,
    fixed={"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0},
    rope_fixed={"rope_type": "default", "mrope_interleaved": True},
    demanded={"attn_output_gate": True, "mlp_only_layers": []},
)


def released(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model of a published folder, which holds it beside a vision tower of its own.

    Raises:
        ConfigError: for a published config without its `text_config`.
    """
    if config.get("model_type") != "qwen3_5_moe":
        return config
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError("config.json of qwen3_5_moe has no text_config; allowed: one")
    # transformers ties by the outer flag, whatever the text config says.
    return {**text, "tie_word_embeddings": bool(config.get("tie_word_embeddings", False))}

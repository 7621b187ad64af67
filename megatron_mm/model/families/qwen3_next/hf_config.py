"""Qwen3-Next in transformers' words (Qwen3NextConfig)."""

from __future__ import annotations

from megatron_mm.config.hf_words import Table, TextWords
from megatron_mm.model.families.qwen3_next.settings import Qwen3NextSettings

# transformers key, our field, default of the transformers class
TEXT: Table = (
    ("vocab_size", "vocab_size", 151936),
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
    ("num_experts", "num_experts", 512),
    ("num_experts_per_tok", "moe_router_topk", 10),
    ("moe_intermediate_size", "moe_ffn_hidden_size", 512),
    ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", 512),
    ("router_aux_loss_coef", "moe_aux_loss_coeff", 0.001),
)
ROPE: Table = (
    ("rope_theta", "rotary_base", 10_000.0),  # published: 1e7
    ("partial_rotary_factor", "rotary_percent", 0.25),
)
TEXT_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
WORDS = TextWords("qwen3_next", Qwen3NextSettings, TEXT, ROPE, layers=48, fixed=TEXT_FIXED)

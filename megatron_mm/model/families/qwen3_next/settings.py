"""Qwen3-Next at the sizes of Qwen3-Next-80B-A3B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_mm.config.fields import Experts, NonNegativeFloat, PositiveFloat, PositiveInt
from megatron_mm.config.settings_model import LanguageConfig


@dataclass
class Qwen3NextSettings(LanguageConfig):
    """Gated DeltaNet, gated attention and mixture-of-experts layers. The fields are explained
    where LanguageConfig declares them."""

    type: str = "qwen3_next"
    vocab_size: PositiveInt = 151936
    hidden_size: PositiveInt = 2048
    layernorm_epsilon: PositiveFloat = 1e-6
    init_method_std: PositiveFloat = 0.02
    max_position_embeddings: PositiveInt = 262144
    untie_embeddings_and_output_weights: bool = True
    num_attention_heads: PositiveInt = 16
    num_query_groups: PositiveInt = 2
    kv_channels: PositiveInt = 256
    rotary_base: PositiveFloat = 10_000_000.0
    rotary_percent: PositiveFloat = 0.25
    linear_conv_kernel_dim: PositiveInt = 4
    linear_key_head_dim: PositiveInt = 128
    linear_value_head_dim: PositiveInt = 128
    linear_num_key_heads: PositiveInt = 16
    linear_num_value_heads: PositiveInt = 32
    num_experts: Experts = 512
    moe_router_topk: PositiveInt = 10
    moe_ffn_hidden_size: PositiveInt = 512
    moe_shared_expert_intermediate_size: PositiveInt = 512
    moe_aux_loss_coeff: NonNegativeFloat = 0.001
    moe_router_dtype: Literal["fp32", "fp64"] = "fp32"

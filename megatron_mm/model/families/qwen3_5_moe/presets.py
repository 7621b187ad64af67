"""Text models of Qwen3.5-MoE at their published sizes.

To fuse one with InternViT, name both: `model: {preset: qwen3.5-35b-a3b, vision: {preset:
internvit-6b}}`.
"""

from __future__ import annotations

from megatron_mm.config.settings_model import ModelConfig
from megatron_mm.model.families.qwen3_5_moe.settings import Qwen35MoeSettings

BLOCK = "GEGEGE*E"


def qwen3_5_35b_a3b() -> ModelConfig:
    """Qwen3.5-35B-A3B's text model (the settings' defaults)."""
    return ModelConfig(BLOCK * 10, Qwen35MoeSettings(), vision=None)


def qwen3_5_397b_a17b() -> ModelConfig:
    """Qwen3.5-397B-A17B's text model."""
    language = Qwen35MoeSettings(
        hidden_size=4096,
        num_attention_heads=32,
        linear_num_value_heads=64,
        num_experts=512,
        moe_router_topk=10,
        moe_ffn_hidden_size=1024,
        moe_shared_expert_intermediate_size=1024,
    )
    return ModelConfig(BLOCK * 15, language, vision=None)


PRESETS = {"qwen3.5-35b-a3b": qwen3_5_35b_a3b, "qwen3.5-397b-a17b": qwen3_5_397b_a17b}

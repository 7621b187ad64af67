"""Whole models around Qwen3-Next, text-only or fused with InternViT."""

from __future__ import annotations

from megatron_mm.config.settings_model import FusionConfig, ModelConfig
from megatron_mm.model.families.internvit.presets import internvit_6b, internvit_300m
from megatron_mm.model.families.internvit.settings import InternViTSettings
from megatron_mm.model.families.qwen3_next.settings import Qwen3NextSettings

BLOCK = "GEGEGE*E"


def tiny() -> ModelConfig:
    """A model for two CPU cores that has every kind of layer and one look/inject pair."""
    return ModelConfig(
        hybrid_layer_pattern="GE *E L J GE *E",
        language=Qwen3NextSettings(
            vocab_size=384,
            hidden_size=96,
            # The usual 0.02 belongs to a width of 2048: 0.02 * sqrt(2048 / 96).
            init_method_std=0.09,
            max_position_embeddings=4096,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=24,
            rotary_base=10_000.0,
            rotary_percent=0.5,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            num_experts=8,
            moe_router_topk=2,
            moe_ffn_hidden_size=64,
            moe_shared_expert_intermediate_size=64,
        ),
        vision=InternViTSettings(
            vision_num_layers=2,
            vision_hidden_size=64,
            vision_ffn_hidden_size=128,
            vision_num_attention_heads=4,
            # InternViT's 0.1 is for a trained encoder; from scratch it barely starts to learn.
            vision_layer_scale_init=1.0,
            vision_init_method_std=0.08,  # likewise, 0.02 * sqrt(1024 / 64)
            image_size=16,
            patch_size=8,
        ),
        fusion=FusionConfig(
            image_stream="thumbnail",
            pixel_shuffle_factor=1,
            vision_memory="tiles",
            memory_hidden_size=48,
            clvr_num_attention_heads=4,
            clvr_kv_channels=24,
        ),
    )


def small() -> ModelConfig:
    """About 31 M parameters in the proportions of the 80B model: two blocks of three GDN layers
    and one attention layer, 16 experts of which 4 serve a token. Trains on a workstation."""
    return ModelConfig(
        hybrid_layer_pattern="GEGE L GE*E J GEGEGE*E",
        language=Qwen3NextSettings(
            vocab_size=8192,
            hidden_size=256,
            init_method_std=0.055,  # 0.02 * sqrt(2048 / 256)
            max_position_embeddings=8192,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=64,
            rotary_base=100_000.0,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
            linear_num_key_heads=4,
            linear_num_value_heads=8,
            num_experts=16,
            moe_router_topk=4,
            moe_ffn_hidden_size=192,
            moe_shared_expert_intermediate_size=192,
        ),
        vision=InternViTSettings(
            vision_num_layers=6,
            vision_hidden_size=192,
            vision_ffn_hidden_size=768,
            vision_num_attention_heads=6,
            vision_layer_scale_init=1.0,  # as in tiny: from scratch 0.1 barely starts to learn
            vision_init_method_std=0.045,  # 0.02 * sqrt(1024 / 192)
            image_size=112,
        ),
        fusion=FusionConfig(
            image_stream="thumbnail",
            vision_memory="tiles",
            memory_hidden_size=128,
            clvr_num_attention_heads=4,
            clvr_kv_channels=64,
        ),
    )


def qwen3_next_80b_a3b() -> ModelConfig:
    """Qwen3-Next-80B-A3B alone, text only, at the published sizes (the settings' defaults)."""
    return ModelConfig(hybrid_layer_pattern=BLOCK * 12, vision=None)


def mm_80b() -> ModelConfig:
    """Qwen3-Next-80B-A3B with InternViT-6B: the stream holds the thumbnail, two looks reach
    the tiles, each injected two blocks later so that a stage boundary fits in between."""
    letters = {4: "L", 6: "J", 8: "L", 10: "J"}  # after which block
    blocks = (BLOCK + letters.get(block, "") for block in range(1, 13))
    return ModelConfig(
        hybrid_layer_pattern=" ".join(blocks),
        vision=internvit_6b(),
        fusion=FusionConfig(image_stream="thumbnail", vision_memory="tiles"),
    )


def mm_80b_300m() -> ModelConfig:
    """mm-80b with InternViT-300M, which InternVL3.5 pairs with its 30B model of experts."""
    model = mm_80b()
    model.vision = internvit_300m()
    return model


PRESETS = {
    "tiny": tiny,
    "small": small,
    "qwen3-next-80b-a3b": qwen3_next_80b_a3b,
    "mm-80b": mm_80b,
    "mm-80b-300m": mm_80b_300m,
}

"""Named models. Each call returns a fresh object, so a caller may change what it got."""

from __future__ import annotations

from megatron_mm.config.settings import FusionConfig, LanguageConfig, ModelConfig, VisionConfig
from megatron_mm.errors import unknown

QWEN3_NEXT_BLOCK = "GEGEGE*E"


def tiny() -> ModelConfig:
    """A model for two CPU cores that has every kind of layer and one look/inject pair."""
    return ModelConfig(
        hybrid_layer_pattern="GE *E L J GE *E",
        language=LanguageConfig(
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
        vision=VisionConfig(
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
        language=LanguageConfig(
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
        vision=VisionConfig(
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
    """Qwen3-Next-80B-A3B alone, text only, at the published sizes (the schema's defaults)."""
    return ModelConfig(hybrid_layer_pattern=QWEN3_NEXT_BLOCK * 12, vision=None)


def mm_80b() -> ModelConfig:
    """Qwen3-Next-80B-A3B with InternViT-6B: the stream holds the thumbnail, two looks reach
    the tiles, each injected two blocks later so that a stage boundary fits in between."""
    letters = {4: "L", 6: "J", 8: "L", 10: "J"}  # after which block
    blocks = (QWEN3_NEXT_BLOCK + letters.get(block, "") for block in range(1, 13))
    return ModelConfig(
        hybrid_layer_pattern=" ".join(blocks),
        vision=internvit_6b(),
        fusion=FusionConfig(image_stream="thumbnail", vision_memory="tiles"),
    )


def internvit_300m() -> VisionConfig:
    """InternViT-300M-448px (the schema's defaults)."""
    return VisionConfig()


def internvit_6b() -> VisionConfig:
    """InternViT-6B-448px-V2.5. Its 25 heads divide by tensor parallel sizes 1, 5 and 25 only."""
    return VisionConfig(
        vision_num_layers=45,
        vision_hidden_size=3200,
        vision_ffn_hidden_size=12800,
        vision_num_attention_heads=25,
        vision_normalization="RMSNorm",
        vision_add_qkv_bias=False,
        vision_qk_layernorm=True,
    )


PRESETS = {
    "tiny": tiny,
    "small": small,
    "qwen3-next-80b-a3b": qwen3_next_80b_a3b,
    "mm-80b": mm_80b,
}
VISION_PRESETS = {"internvit-300m": internvit_300m, "internvit-6b": internvit_6b}


def preset(name: str) -> ModelConfig:
    """A whole model by name. Raises ConfigError with the names there are."""
    if name not in PRESETS:
        raise unknown("model preset", name, PRESETS)
    return PRESETS[name]()


def vision_preset(name: str) -> VisionConfig:
    """A vision model by name. Raises ConfigError with the names there are."""
    if name not in VISION_PRESETS:
        raise unknown("vision preset", name, VISION_PRESETS)
    return VISION_PRESETS[name]()

"""Published InternViTs."""

from __future__ import annotations

from megatron_mm.model.families.internvit.settings import InternViTSettings


def internvit_300m() -> InternViTSettings:
    """InternViT-300M-448px (the settings' defaults)."""
    return InternViTSettings()


def internvit_6b() -> InternViTSettings:
    """InternViT-6B-448px-V2.5. Tensor-parallel ranks that do not divide its 25 heads pad them."""
    return InternViTSettings(
        vision_num_layers=45,
        vision_hidden_size=3200,
        vision_ffn_hidden_size=12800,
        vision_num_attention_heads=25,
        vision_normalization="RMSNorm",
        vision_add_qkv_bias=False,
        vision_qk_layernorm=True,
    )


PRESETS = {"internvit-300m": internvit_300m, "internvit-6b": internvit_6b}

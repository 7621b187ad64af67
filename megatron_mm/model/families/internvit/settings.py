"""InternViT at the sizes of InternViT-300M-448px."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_mm.config.fields import Layers, NonNegativeFloat, PositiveFloat, PositiveInt
from megatron_mm.config.settings_model import VisionConfig


@dataclass
class InternViTSettings(VisionConfig):
    """A ViT with a class token, layer scale and learned positions."""

    type: str = "internvit"
    vision_hidden_size: PositiveInt = 1024
    vision_init_method_std: PositiveFloat = 0.02
    vision_num_layers: Layers = 24
    """Layers of the ViT."""
    vision_ffn_hidden_size: PositiveInt = 4096
    """Inner features of the ViT's MLP."""
    vision_num_attention_heads: PositiveInt = 16
    """Attention heads of the ViT. Heads that tensor-parallel ranks do not divide are padded."""
    vision_normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Norm before the ViT's attention and MLP; InternViT-6B has RMSNorm."""
    vision_layernorm_epsilon: PositiveFloat = 1e-6
    """Added to the variance, or the mean square, in the ViT's norms."""
    vision_add_qkv_bias: bool = True
    """Whether the ViT's query, key and value projections have a bias."""
    vision_qk_layernorm: bool = False
    """RMSNorm of the ViT's queries and keys over all heads together, as InternViT-6B has."""
    vision_layer_scale_init: NonNegativeFloat = 0.1
    """Scale of every residual branch of the ViT before training."""
    image_size: PositiveInt = 448
    """Pixels along one side of a square tile."""
    patch_size: PositiveInt = 14
    """Pixels along one side of a square patch."""

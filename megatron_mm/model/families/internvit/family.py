"""The declaration of InternViT (https://huggingface.co/OpenGVLab/InternViT-6B-448px-V2_5)."""

from __future__ import annotations

from typing import Any

from megatron_mm.config.families import EncoderCost, PatchGrid, VisionFamily
from megatron_mm.config.rules import divides
from megatron_mm.config.settings import ParallelConfig
from megatron_mm.config.settings_model import FusionConfig
from megatron_mm.model.families.internvit import hf_config
from megatron_mm.model.families.internvit.presets import PRESETS
from megatron_mm.model.families.internvit.settings import InternViTSettings


def grid(vit: InternViTSettings, pixels: tuple[int, int] | None = None) -> PatchGrid:
    height, width = pixels or (vit.image_size, vit.image_size)
    return PatchGrid(height, width, vit.patch_size)


def core(vit: InternViTSettings, tp: int) -> dict[str, Any]:
    heads = -(-vit.vision_num_attention_heads // tp) * tp  # padded
    return {
        "num_layers": vit.vision_num_layers,
        "hidden_size": vit.vision_hidden_size,
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": vit.vision_hidden_size // vit.vision_num_attention_heads,
        "ffn_hidden_size": vit.vision_ffn_hidden_size,
    }


def cost(vit: InternViTSettings) -> EncoderCost:
    width, inner = vit.vision_hidden_size, vit.vision_ffn_hidden_size
    return EncoderCost(
        embedding=(3 * vit.patch_size**2, width),
        layer=((width, 3 * width), (width, width), (width, inner), (inner, width)),
        layers=vit.vision_num_layers,
        positions=grid(vit).patches + 1,  # and the class token
        width=width,
    )


def check(vit: InternViTSettings, fusion: FusionConfig, parallel: ParallelConfig) -> None:
    heads = vit.vision_num_attention_heads
    divides("vision_hidden_size", vit.vision_hidden_size, "vision_num_attention_heads", heads)
    # Heads that do not divide are padded; the features are never split but by heads.
    tp = parallel.tensor_model_parallel_size
    divides("vision_ffn_hidden_size", vit.vision_ffn_hidden_size, "tensor_model_parallel_size", tp)
    divides("image_size", vit.image_size, "patch_size", vit.patch_size)
    side = f"patches per side (image_size {vit.image_size} / patch_size {vit.patch_size} =)"
    divides(side, grid(vit).rows, "pixel_shuffle_factor", fusion.pixel_shuffle_factor)


FAMILY = VisionFamily(
    title="InternViT",
    settings=InternViTSettings,
    presets=PRESETS,
    build="megatron_mm.model.families.internvit.model.InternViT",
    rows="megatron_mm.model.families.internvit.names.ROWS",
    grid=grid,
    core=core,
    cost=cost,
    check=check,
    hf_encoder_type=hf_config.ENCODER_TYPE,
    hf_type=hf_config.FUSED_TYPE,
    hf_classes=("InternVLConfig", "InternVLForConditionalGeneration"),
    to_hf=hf_config.to_hf,
    from_hf=hf_config.from_hf,
    released=hf_config.released,
)

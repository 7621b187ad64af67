"""InternViT's tensors in Hugging Face folders.

Sources: transformers 5.23 and its conversion script, and InternVL's release
(modeling_intern_vit.py: `attn.qkv` is all queries, all keys, all values).
"""

from __future__ import annotations

from typing import cast

from megatron_mm.config import ModelConfig
from megatron_mm.model.families.internvit.settings import InternViTSettings
from megatron_mm.model.families.rows import Form, Row, released_row
from megatron_mm.model.families.transforms import ByHead, Transform


def _head(model: ModelConfig) -> tuple[int, int]:
    vision = cast(InternViTSettings, model.vision)
    heads = vision.vision_num_attention_heads
    return heads, vision.vision_hidden_size // heads


def _qkv(model: ModelConfig) -> Transform:
    heads, width = _head(model)
    return ByHead(heads, (width, width, width))


def _fused_qkv(model: ModelConfig) -> Transform:
    heads, width = _head(model)
    return ByHead(heads, (width, width, width), fused=3)


def _embedding(mcore: str, transformers: str, release: str) -> Row:
    there = "{vit}embeddings."
    return released_row("vision.vit.embedding." + mcore, there + transformers, there + release)


def _layer(mcore: str, transformers: str, release: str) -> Row:
    return released_row(
        "vision.vit.layers.{layer}." + mcore,
        "{vit}encoder.layer.{layer}." + transformers,
        "{vit}encoder.layers.{layer}." + release,
    )


def _attention(part: str) -> Row:
    there = "{vit}encoder.layer.{layer}.attention."
    names = tuple(f"{there}{kind}_proj.{part}" for kind in "qkv")
    fused = (f"{{vit}}encoder.layers.{{layer}}.attn.qkv.{part}",)
    return released_row(
        f"vision.vit.layers.{{layer}}.attention.linear_qkv.{part}",
        Form(names, _qkv, release=False),
        Form(fused, _fused_qkv, release=True),
    )


ROWS = (
    _embedding("class_token", "cls_token", "class_embedding"),
    _embedding("positions", "position_embeddings", "position_embedding"),
    *(
        _embedding(
            f"patch_{part}", f"patch_embeddings.projection.{part}", f"patch_embedding.{part}"
        )
        for part in ("weight", "bias")
    ),
    _layer("scale1", "lambda_1", "ls1"),
    _layer("scale2", "lambda_2", "ls2"),
    _layer("attention.q_norm.weight", "attention.q_norm.weight", "attn.q_norm.weight"),
    _layer("attention.k_norm.weight", "attention.k_norm.weight", "attn.k_norm.weight"),
    *(
        row
        for part in ("weight", "bias")
        for row in (
            _attention(part),
            _layer(
                f"attention.linear_proj.{part}",
                f"attention.projection_layer.{part}",
                f"attn.proj.{part}",
            ),
            _layer(f"norm1.{part}", f"layernorm_before.{part}", f"norm1.{part}"),
            _layer(f"norm2.{part}", f"layernorm_after.{part}", f"norm2.{part}"),
            _layer(f"linear_fc1.{part}", f"mlp.fc1.{part}", f"mlp.fc1.{part}"),
            _layer(f"linear_fc2.{part}", f"mlp.fc2.{part}", f"mlp.fc2.{part}"),
        )
    ),
)

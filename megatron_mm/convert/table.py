"""The one table of names: which tensors of Hugging Face's are which of ours, and how.

Both directions, the plan, the check and the tests read these rows and nothing else. A row
names one of our tensors (as the model names it, global layer numbers) and, for every way in
which it is spelled outside, their tensors and the transform between. Braces stand for what
varies: `{layer}`, `{pair}` and `{rest}` are the same on both sides; `{expert}` counts our first
dimension, each index of which is transformed by itself; `{text}`, `{head}`, `{vit}` and
`{projector}` are the prefixes of a spelling.

Sizes come from the model's config: transforms that need one are made by `how(model)`.

Sources: transformers 5.23 (what `save_pretrained` writes, and its state dicts), the released
Qwen3-Next-80B-A3B (per-expert tensors, `mtp.*`), InternVL's release (modeling_intern_vit.py:
`attn.qkv` is all queries, all keys, all values) and transformers' conversion script for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_mm.config import ModelConfig
from megatron_mm.convert.transforms import ByHead, Joined, Stacked, Transform


@dataclass(frozen=True)
class Spelling:
    """How a folder writes its names.

    Attributes:
        release: the ViT and the projector are named as in InternVL's release.
        stacked: the experts of a layer are one tensor, not one each.
    """

    text: str = ""
    head: str = ""
    vit: str = ""
    projector: str = ""
    release: bool = False
    stacked: bool = False


# What `save_pretrained` writes today comes first: it is what a fused model is exported as.
SPELLINGS = {
    "transformers": Spelling(
        "language_model.model.", "language_model.", "vision_tower.", "multi_modal_projector."
    ),
    # save_original_format=False, and the names inside the model
    "stacked": Spelling(
        "model.language_model.",
        "",
        "model.vision_tower.",
        "model.multi_modal_projector.",
        stacked=True,
    ),
    "internvl": Spelling(
        "language_model.model.", "language_model.", "vision_model.", "mlp1.", release=True
    ),
    "text": Spelling("model."),
    "text-stacked": Spelling("model.", stacked=True),
    # one model alone: InternViT as released, and as transformers' InternVLVisionModel
    "internvit": Spelling("model.", release=True),
    "vision-tower": Spelling("model."),
}
# Carried beside the model, bit for bit: nothing of ours computes with it (transformers drops it).
CARRIED = ("mtp.", "language_model.mtp.")

How = Callable[[ModelConfig], Transform]


@dataclass(frozen=True)
class Form:
    """One way of spelling a tensor. `release` and `stacked` say which spellings use it; None:
    all do."""

    names: tuple[str, ...]
    how: How
    release: bool | None = None
    stacked: bool | None = None

    def used_by(self, spelling: Spelling) -> bool:
        return self.release in (None, spelling.release) and self.stacked in (
            None,
            spelling.stacked,
        )


@dataclass(frozen=True)
class Row:
    ours: str
    forms: tuple[Form, ...]


def _same(model: ModelConfig) -> Transform:
    return Transform()


def _gate_up(model: ModelConfig) -> Transform:
    return Stacked(2)


def _joined(model: ModelConfig) -> Transform:
    return Joined()


def _attention(model: ModelConfig) -> Transform:
    """Of query head i: query and gate, and the i-th slices of its group's key and value."""
    lm = model.language
    piece = lm.kv_channels * lm.num_query_groups // lm.num_attention_heads
    return ByHead(lm.num_attention_heads, (2 * lm.kv_channels, piece, piece))


def _gdn_widths(model: ModelConfig) -> tuple[int, int, int]:
    """Of a key head: rows of its key, of its values, and how many values."""
    lm = model.language
    values = lm.linear_num_value_heads // lm.linear_num_key_heads
    return lm.linear_key_head_dim, values * lm.linear_value_head_dim, values


def _gdn(model: ModelConfig) -> Transform:
    key, value, values = _gdn_widths(model)
    return ByHead(model.language.linear_num_key_heads, (2 * key + 2 * value, 2 * values))


def _conv(model: ModelConfig) -> Transform:
    key, value, _ = _gdn_widths(model)
    heads = model.language.linear_num_key_heads
    return ByHead(heads, (key, key, value), fused=True, unit=True)


def _vision_head(model: ModelConfig) -> tuple[int, int]:
    heads = model.vision.vision_num_attention_heads
    return heads, model.vision.vision_hidden_size // heads


def _vision_qkv(model: ModelConfig) -> Transform:
    heads, width = _vision_head(model)
    return ByHead(heads, (width, width, width))


def _vision_fused_qkv(model: ModelConfig) -> Transform:
    heads, width = _vision_head(model)
    return ByHead(heads, (width, width, width), fused=True)


def _row(ours: str, *names: str, how: How = _same) -> Row:
    return Row(ours, (Form(names, how),))


def _text(ours: str, *names: str, how: How = _same) -> Row:
    prefix = "{text}layers.{layer}."
    names = tuple(prefix + name for name in names)
    return _row("language.layers.{layer}." + ours, *names, how=how)


def _experts(ours: str, separate: tuple[str, ...], stacked: str, how: How, how_stacked: How) -> Row:
    prefix = "{text}layers.{layer}.mlp.experts."
    return Row(
        "language.layers.{layer}.moe.inner.experts." + ours,
        (
            Form(tuple(f"{prefix}{{expert}}.{n}" for n in separate), how, stacked=False),
            Form((prefix + stacked,), how_stacked, stacked=True),
        ),
    )


def _both(ours: str, transformers: Form, release: Form) -> Row:
    """A tensor of the vision side, as transformers and as the release spell it."""
    return Row(ours, (transformers, release))


def _forms(theirs: str, release: str, ours: str) -> Row:
    return _both(ours, Form((theirs,), _same, release=False), Form((release,), _same, release=True))


def _vision(ours: str, transformers: str, release: str) -> Row:
    return _forms(
        "{vit}encoder.layer.{layer}." + transformers,
        "{vit}encoder.layers.{layer}." + release,
        "vision.vit.layers.{layer}." + ours,
    )


def _vision_attention(part: str) -> Row:
    there = "{vit}encoder.layer.{layer}.attention."
    names = tuple(f"{there}{kind}_proj.{part}" for kind in "qkv")
    return _both(
        f"vision.vit.layers.{{layer}}.attention.linear_qkv.{part}",
        Form(names, _vision_qkv, release=False),
        Form(
            (f"{{vit}}encoder.layers.{{layer}}.attn.qkv.{part}",), _vision_fused_qkv, release=True
        ),
    )


TEXT = (
    _row("embedding.weight", "{text}embed_tokens.weight"),
    _row("output_layer.weight", "{head}lm_head.weight"),
    _row("final_norm.weight", "{text}norm.weight"),
    _text("mixer.norm.weight", "input_layernorm.weight"),
    _text("moe.norm.weight", "post_attention_layernorm.weight"),
    # gated attention
    _text(
        "mixer.inner.linear_qkv.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        how=_attention,
    ),
    _text("mixer.inner.linear_proj.weight", "self_attn.o_proj.weight"),
    _text("mixer.inner.q_norm.weight", "self_attn.q_norm.weight"),
    _text("mixer.inner.k_norm.weight", "self_attn.k_norm.weight"),
    # gated DeltaNet
    _text(
        "mixer.inner.in_proj.weight",
        "linear_attn.in_proj_qkvz.weight",
        "linear_attn.in_proj_ba.weight",
        how=_gdn,
    ),
    _text("mixer.inner.conv_weight", "linear_attn.conv1d.weight", how=_conv),
    _text("mixer.inner.A_log", "linear_attn.A_log"),
    _text("mixer.inner.dt_bias", "linear_attn.dt_bias"),
    _text("mixer.inner.out_norm.weight", "linear_attn.norm.weight"),
    _text("mixer.inner.out_proj.weight", "linear_attn.out_proj.weight"),
    # mixture of experts
    _text("moe.inner.router.weight", "mlp.gate.weight"),
    _experts("gate_up", ("gate_proj.weight", "up_proj.weight"), "gate_up_proj", _gate_up, _joined),
    _experts("down", ("down_proj.weight",), "down_proj", _same, _same),
    _text(
        "moe.inner.shared_experts.linear_fc1.weight",
        "mlp.shared_expert.gate_proj.weight",
        "mlp.shared_expert.up_proj.weight",
        how=_gate_up,
    ),
    _text("moe.inner.shared_experts.linear_fc2.weight", "mlp.shared_expert.down_proj.weight"),
    _text("moe.inner.shared_experts.gate_weight", "mlp.shared_expert_gate.weight"),
)
VISION = (
    _forms(
        "{vit}embeddings.cls_token",
        "{vit}embeddings.class_embedding",
        "vision.vit.embedding.class_token",
    ),
    _forms(
        "{vit}embeddings.position_embeddings",
        "{vit}embeddings.position_embedding",
        "vision.vit.embedding.positions",
    ),
    *(
        _forms(
            "{vit}embeddings.patch_embeddings.projection." + part,
            "{vit}embeddings.patch_embedding." + part,
            "vision.vit.embedding.patch_" + part,
        )
        for part in ("weight", "bias")
    ),
    _vision("scale1", "lambda_1", "ls1"),
    _vision("scale2", "lambda_2", "ls2"),
    _vision("attention.q_norm.weight", "attention.q_norm.weight", "attn.q_norm.weight"),
    _vision("attention.k_norm.weight", "attention.k_norm.weight", "attn.k_norm.weight"),
    *(
        row
        for part in ("weight", "bias")
        for row in (
            _vision_attention(part),
            _vision(
                f"attention.linear_proj.{part}",
                f"attention.projection_layer.{part}",
                f"attn.proj.{part}",
            ),
            _vision(f"norm1.{part}", f"layernorm_before.{part}", f"norm1.{part}"),
            _vision(f"norm2.{part}", f"layernorm_after.{part}", f"norm2.{part}"),
            _vision(f"linear_fc1.{part}", f"mlp.fc1.{part}", f"mlp.fc1.{part}"),
            _vision(f"linear_fc2.{part}", f"mlp.fc2.{part}", f"mlp.fc2.{part}"),
        )
    ),
)
PROJECTOR = tuple(
    _forms(f"{{projector}}{theirs}.{part}", f"{{projector}}{number}.{part}", f"{ours}.{part}")
    for ours, theirs, number in (
        ("vision.projector.norm", "layer_norm", 0),
        ("vision.projector.linear_fc1", "linear_1", 1),
        ("vision.projector.linear_fc2", "linear_2", 3),
    )
    for part in ("weight", "bias")
)
# CLVR is ours alone; the remote code of an export uses these names.
CLVR = (
    _row("vision.memory_proj.{rest}", "clvr.memory_proj.{rest}"),
    _row("vision.memory_projs.{rest}", "clvr.memory_projs.{rest}"),
    _row("language.looks.{pair}.{rest}", "clvr.looks.{pair}.{rest}"),
)
ROWS = (*TEXT, *VISION, *PROJECTOR, *CLVR)

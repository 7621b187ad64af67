"""Qwen3-Next's tensors in Hugging Face folders.

Sources: transformers 5.23 (what `save_pretrained` writes, and its state dicts) and the released
Qwen3-Next-80B-A3B (a tensor for each expert).
"""

from __future__ import annotations

from megatron_mm.config import ModelConfig
from megatron_mm.model.families.rows import Form, How, Row, layer_row, row, same
from megatron_mm.model.families.transforms import ByHead, Joined, Stacked, Transform


def attention(model: ModelConfig) -> Transform:
    """Query head i holds its query and gate, and the i-th slices of its group's key and value."""
    lm = model.language
    piece = lm.kv_channels * lm.num_query_groups // lm.num_attention_heads
    return ByHead(lm.num_attention_heads, (2 * lm.kv_channels, piece, piece))


def gdn_widths(model: ModelConfig) -> tuple[int, int, int]:
    """Rows of a key head's key, rows of its values, and the number of its values."""
    lm = model.language
    values = lm.linear_num_value_heads // lm.linear_num_key_heads
    return lm.linear_key_head_dim, values * lm.linear_value_head_dim, values


def _gdn(model: ModelConfig) -> Transform:
    """Two tensors, each grouped by key head already: [q, k, v, z] and [b, a]."""
    key, value, values = gdn_widths(model)
    return ByHead(model.language.linear_num_key_heads, (2 * key + 2 * value, 2 * values))


def _conv(model: ModelConfig) -> Transform:
    key, value, _ = gdn_widths(model)
    return ByHead(model.language.linear_num_key_heads, (key, key, value), fused=3, unit=True)


def _gate_up(model: ModelConfig) -> Transform:
    return Stacked(2)


def _joined(model: ModelConfig) -> Transform:
    return Joined()


def _experts(mcore: str, separate: tuple[str, ...], stacked: str, how: How, joined: How) -> Row:
    prefix = "{text}layers.{layer}.mlp.experts."
    return Row(
        "language.layers.{layer}.moe.inner.experts." + mcore,
        (
            Form(tuple(f"{prefix}{{expert}}.{n}" for n in separate), how, stacked=False),
            Form((prefix + stacked,), joined, stacked=True),
        ),
    )


ENDS = (
    row("embedding.weight", "{text}embed_tokens.weight"),
    row("output_layer.weight", "{head}lm_head.weight"),
    row("final_norm.weight", "{text}norm.weight"),
)
MIXER_NORM = layer_row("mixer.norm.weight", "input_layernorm.weight")
ATTENTION = (
    layer_row(
        "mixer.inner.linear_qkv.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        how=attention,
    ),
    layer_row("mixer.inner.linear_proj.weight", "self_attn.o_proj.weight"),
    layer_row("mixer.inner.q_norm.weight", "self_attn.q_norm.weight"),
    layer_row("mixer.inner.k_norm.weight", "self_attn.k_norm.weight"),
)
GDN_IN = layer_row(
    "mixer.inner.in_proj.weight",
    "linear_attn.in_proj_qkvz.weight",
    "linear_attn.in_proj_ba.weight",
    how=_gdn,
)
GDN = (
    layer_row("mixer.inner.conv_weight", "linear_attn.conv1d.weight", how=_conv),
    layer_row("mixer.inner.A_log", "linear_attn.A_log"),
    layer_row("mixer.inner.dt_bias", "linear_attn.dt_bias"),
    layer_row("mixer.inner.out_norm.weight", "linear_attn.norm.weight"),
    layer_row("mixer.inner.out_proj.weight", "linear_attn.out_proj.weight"),
)
EXPERTS = (
    layer_row("moe.norm.weight", "post_attention_layernorm.weight"),
    layer_row("moe.inner.router.weight", "mlp.gate.weight"),
    _experts("gate_up", ("gate_proj.weight", "up_proj.weight"), "gate_up_proj", _gate_up, _joined),
    _experts("down", ("down_proj.weight",), "down_proj", same, same),
    layer_row(
        "moe.inner.shared_experts.linear_fc1.weight",
        "mlp.shared_expert.gate_proj.weight",
        "mlp.shared_expert.up_proj.weight",
        how=_gate_up,
    ),
    layer_row("moe.inner.shared_experts.linear_fc2.weight", "mlp.shared_expert.down_proj.weight"),
    layer_row("moe.inner.shared_experts.gate_weight", "mlp.shared_expert_gate.weight"),
)
# The norm before a mixer has one name, whichever mixer it is.
ROWS = {"": (*ENDS, MIXER_NORM), "*": ATTENTION, "G": (GDN_IN, *GDN), "E": EXPERTS}
# The second hop of letter C, beside what its E has. transformers has no such layer: the remote code
# of an export uses these names.
DELEGATE = (layer_row("moe.inner.delegate.{rest}", "mlp.delegate.{rest}"),)

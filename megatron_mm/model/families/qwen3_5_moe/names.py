"""Tensors of Qwen3.5-MoE's text model in Hugging Face folders.

They are Qwen3-Next's but for the projections of a gated DeltaNet. Sources: transformers 5.23 (what
`save_pretrained` writes, and its state dicts); in the published folders the names are those inside
`Qwen3_5MoeForConditionalGeneration` (spelling "stacked"), beside `mtp.*` and `model.visual.*`.
"""

from __future__ import annotations

from megatron_mm.config import ModelConfig
from megatron_mm.model.families.qwen3_next import names as qwen3_next
from megatron_mm.model.families.rows import layer_row
from megatron_mm.model.families.transforms import ByHead, Transform


def _gdn(model: ModelConfig) -> Transform:
    """Rows [q, k, v, z, b, a] of every key head; in files all q, all k and all v lie in one tensor,
    z, b and a in one each."""
    key, value, values = qwen3_next.gdn_widths(model)
    heads = model.language.linear_num_key_heads
    return ByHead(heads, (key, key, value, value, values, values), fused=3)


GDN_IN = layer_row(
    "mixer.inner.in_proj.weight",
    "linear_attn.in_proj_qkv.weight",
    "linear_attn.in_proj_z.weight",
    "linear_attn.in_proj_b.weight",
    "linear_attn.in_proj_a.weight",
    how=_gdn,
)
ROWS = {**qwen3_next.ROWS, "G": (GDN_IN, *qwen3_next.GDN)}

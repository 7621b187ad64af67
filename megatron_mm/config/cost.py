"""What each part of the model costs to compute: for the balanced pipeline split.

Floating point operations of the matrix products in one forward pass over one sample: a
full stream of `seq_length` tokens with one image of `max_num_tiles` tiles. Backward costs
twice as much again, except below a frozen ViT. Everything is a pure function of settings.

Letters: T tokens, M memory patches, H hidden size, h heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_mm.config.schema import LanguageConfig, RunConfig, VisionConfig


@dataclass(frozen=True)
class Costs:
    """Of a sub-layer by its letter, and of what only the first and the last stage have."""

    letters: dict[str, float] = field(
        default_factory=lambda: {"G": 1.0, "*": 1.0, "E": 1.0, "L": 0.0, "J": 0.0}
    )
    first: float = 0.0
    last: float = 0.0


def costs(run: RunConfig) -> Costs:
    """FLOPs of one forward pass; a frozen ViT, which has no backward pass, counts a third."""
    model, tokens = run.model, run.data.seq_length
    lm = model.language
    letters = {
        "G": delta_net(lm, tokens),
        "*": attention(lm, tokens),
        "E": experts(lm, tokens),
        "L": 0.0,
        "J": 0.0,
    }
    first = 0.0
    if model.vision is not None:
        share = 1 / 3 if run.training.freeze_vision else 1.0
        first = share * vision(model.vision, _tiles(run))
        letters["L"] = look(run, tokens)
    return Costs(letters, first, last=2.0 * tokens * lm.hidden_size * lm.vocab_size)


def delta_net(lm: LanguageConfig, tokens: int) -> float:
    """Projections, and the read and the write of the state [key width, value width] per head."""
    key_heads, value_heads = lm.linear_num_key_heads, lm.linear_num_value_heads
    keys, values = key_heads * lm.linear_key_head_dim, value_heads * lm.linear_value_head_dim
    projections = lm.hidden_size * (2 * keys + 3 * values + 2 * value_heads)
    state = 3 * value_heads * lm.linear_key_head_dim * lm.linear_value_head_dim
    return 2.0 * tokens * (projections + state)


def attention(lm: LanguageConfig, tokens: int) -> float:
    """Projections with gate, and causal attention over the whole stream."""
    heads = lm.num_attention_heads * lm.kv_channels
    groups = lm.num_query_groups * lm.kv_channels
    projections = lm.hidden_size * (3 * heads + 2 * groups)
    return 2.0 * tokens * (projections + tokens * heads)


def experts(lm: LanguageConfig, tokens: int) -> float:
    """Router, the chosen experts and the shared one with its gate, each a gated MLP."""
    width = lm.moe_router_topk * lm.moe_ffn_hidden_size + lm.moe_shared_expert_intermediate_size
    return 2.0 * tokens * lm.hidden_size * (lm.num_experts + 1 + 3 * width)


def look(run: RunConfig, tokens: int) -> float:
    """Projections of the hidden state and of the memory, and attention between them. Those of the
    coordinates are left out."""
    lm, fusion = run.model.language, run.model.fusion
    width = fusion.clvr_num_attention_heads * fusion.clvr_kv_channels
    memory_width = fusion.memory_hidden_size or lm.hidden_size // 4
    tiles = {"none": 0, "thumbnail": 1, "tiles": run.data.max_num_tiles}[fusion.vision_memory]
    patches = tiles * _patches(run.model.vision)
    return 2.0 * width * (2 * tokens * lm.hidden_size + 2 * patches * memory_width) + (
        4.0 * tokens * patches * width
    )


def vision(vit: VisionConfig, tiles: int) -> float:
    """The ViT over that many tiles."""
    positions, width = _patches(vit) + 1, vit.vision_hidden_size
    layer = positions * width * (4 * width + 2 * vit.vision_ffn_hidden_size + 2 * positions)
    embedding = _patches(vit) * width * 3 * vit.patch_size**2
    return 2.0 * tiles * (vit.vision_num_layers * layer + embedding)


def _patches(vit: VisionConfig) -> int:
    return (vit.image_size // vit.patch_size) ** 2


def _tiles(run: RunConfig) -> int:
    thumbnail = run.data.use_thumbnail and run.data.max_num_tiles > 1
    return run.data.max_num_tiles + int(thumbnail)

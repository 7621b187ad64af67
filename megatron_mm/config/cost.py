"""What each part of the model costs to compute: sizes of its matrix products, by settings alone.

For the balanced pipeline split: FLOPs of one forward pass over one sample, a full stream of
`seq_length` tokens with one image of `max_num_tiles` tiles. Backward costs twice as much again,
except below a frozen ViT. What a real microbatch costs is counted from the same sizes
(perf/flops.py). Everything is a pure function of settings.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_mm.config.families import Linear, vision_family
from megatron_mm.config.settings import LanguageConfig, ModelConfig, RunConfig


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
    lm, of = model.language, language_linears(model.language)
    pairs = causal_pairs(tokens)
    letters = {
        "G": products(of["G"], tokens) + delta_rule(lm, tokens),
        "*": products(of["*"], tokens) + attention(lm, pairs),
        "E": sum(products(of[k], tokens) for k in ("router", "experts", "shared", "shared gate")),
        "L": 0.0,
        "J": 0.0,
    }
    first = 0.0
    if model.vision is not None:
        of |= vision_linears(model)
        share = 1 / 3 if run.training.freeze_vision else 1.0
        first = share * vision(model, _tiles(run))
        memory = {"none": 0, "thumbnail": 1, "tiles": run.data.max_num_tiles}
        seen = memory[model.fusion.vision_memory] * patches(model)
        letters["L"] = products(of["L"], tokens) + products(of["L memory"], seen)
        letters["L"] += look(model, tokens * seen)
    return Costs(letters, first, last=products(of["output"], tokens))


def products(linears: Iterable[Linear], rows: float) -> float:
    """FLOPs of so many rows times the weights of each linear."""
    return 2.0 * rows * sum(inputs * outputs for inputs, outputs in linears)


def causal_pairs(tokens: int) -> float:
    """Pairs (query, key) of a sample, a position with itself included."""
    return tokens * (tokens + 1) / 2


def language_linears(lm: LanguageConfig) -> dict[str, tuple[Linear, ...]]:
    """Of one sub-layer by its letter; of `E` by its parts, the chosen experts as one token meets
    them; `output` of the output layer. Halves of a gated MLP are one linear."""
    hidden, value_heads = lm.hidden_size, lm.linear_num_value_heads
    keys = lm.linear_num_key_heads * lm.linear_key_head_dim
    values = value_heads * lm.linear_value_head_dim
    heads, groups = (n * lm.kv_channels for n in (lm.num_attention_heads, lm.num_query_groups))
    expert, shared = lm.moe_ffn_hidden_size, lm.moe_shared_expert_intermediate_size
    return {
        "G": ((hidden, 2 * (keys + values + value_heads)), (values, hidden)),
        "*": ((hidden, 2 * (heads + groups)), (heads, hidden)),  # query and gate, key and value
        "router": ((hidden, lm.num_experts),),
        "experts": ((hidden, 2 * expert), (expert, hidden)) * lm.moe_router_topk,
        "shared": ((hidden, 2 * shared), (shared, hidden)),
        "shared gate": ((hidden, 1),),
        "output": ((hidden, lm.vocab_size),),
    }


def vision_linears(model: ModelConfig) -> dict[str, tuple[Linear, ...]]:
    """`patches` and `vit layer` by position of a tile, `projector` by token of the stream,
    `memory` by patch of the memory; of a look, `L` by token and `L memory` by patch, without the
    keys' coordinates."""
    fusion, hidden = model.fusion, model.language.hidden_size
    encoder, width = vision_family(model).cost(model.vision), model.vision.vision_hidden_size
    memory_width = fusion.memory_hidden_size or hidden // 4
    look_width = fusion.clvr_num_attention_heads * fusion.clvr_kv_channels
    return {
        "patches": (encoder.embedding,),
        "vit layer": encoder.layer,
        "projector": ((width * fusion.pixel_shuffle_factor**2, hidden), (hidden, hidden)),
        "memory": ((width, memory_width),),
        "L": ((hidden, look_width), (look_width, hidden)),
        "L memory": ((memory_width, 2 * look_width),),
    }


def delta_rule(lm: LanguageConfig, tokens: int) -> float:
    """As a recurrence: a read, a write and a read-out of every head's state [K, V] by token."""
    state = lm.linear_num_value_heads * lm.linear_key_head_dim * lm.linear_value_head_dim
    return 3 * 2.0 * tokens * state


def attention(lm: LanguageConfig, pairs: float) -> float:
    """Scores and mixtures of so many pairs (query, key)."""
    return 4.0 * pairs * lm.num_attention_heads * lm.kv_channels


def look(model: ModelConfig, pairs: float) -> float:
    """Scores and mixtures of so many pairs (position, patch)."""
    return 4.0 * pairs * model.fusion.clvr_num_attention_heads * model.fusion.clvr_kv_channels


def vision_attention(model: ModelConfig, tiles: int) -> float:
    """Scores and mixtures of one layer of the encoder, within tiles."""
    encoder = vision_family(model).cost(model.vision)
    return 4.0 * tiles * encoder.positions**2 * encoder.width


def vision(model: ModelConfig, tiles: int) -> float:
    """The encoder over that many tiles."""
    of, encoder = vision_linears(model), vision_family(model).cost(model.vision)
    layer = products(of["vit layer"], tiles * encoder.positions) + vision_attention(model, tiles)
    return encoder.layers * layer + products(of["patches"], tiles * patches(model))


def patches(model: ModelConfig) -> int:
    """Patches of one tile."""
    return vision_family(model).grid(model.vision, None).patches


def _tiles(run: RunConfig) -> int:
    thumbnail = run.data.use_thumbnail and run.data.max_num_tiles > 1
    return run.data.max_num_tiles + int(thumbnail)

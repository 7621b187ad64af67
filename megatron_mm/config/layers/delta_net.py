"""`G`: gated DeltaNet, linear attention by the gated delta rule (arXiv 2412.06464)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_mm.config.layers.counting import Counter, Linear
from megatron_mm.config.layers.kinds import LayerKind
from megatron_mm.config.rules import divides, head_ranks

if TYPE_CHECKING:
    from megatron_mm.config.settings import RunConfig
    from megatron_mm.config.settings_model import LanguageConfig


def linears(lm: LanguageConfig) -> tuple[Linear, Linear]:
    """in_proj (query, key, value, gate, decay and write strength) and out_proj."""
    hidden, value_heads = lm.hidden_size, lm.linear_num_value_heads
    keys = lm.linear_num_key_heads * lm.linear_key_head_dim
    values = value_heads * lm.linear_value_head_dim
    return (hidden, 2 * (keys + values + value_heads)), (values, hidden)


def delta_rule(run: RunConfig, tokens: int) -> tuple[float, float]:
    """FLOPs (forward, backward) of the recurrence: each token reads, writes and reads out the state
    [K, V] of every head."""
    lm = run.model.language
    state = lm.linear_num_value_heads * lm.linear_key_head_dim * lm.linear_value_head_dim
    forward = 3 * 2.0 * tokens * state
    return forward, 2 * forward


def _flops(counter: Counter) -> bool:
    mixing = counter.work.mixing["G"]
    return counter.mixer("delta_net", *linears(counter.run.model.language), mixing)


def _check(run: RunConfig) -> None:
    lm = run.model.language
    divides("linear_num_key_heads", lm.linear_num_key_heads, *head_ranks(run.parallel))
    divides(
        "linear_num_value_heads",
        lm.linear_num_value_heads,
        "linear_num_key_heads",
        lm.linear_num_key_heads,
    )


def _fp8_features(run: RunConfig) -> Iterator[tuple[str, int]]:
    lm, tp = run.model.language, run.parallel.tensor_model_parallel_size
    heads = lm.linear_num_key_heads
    per_key = lm.linear_num_value_heads // heads
    value_rows = per_key * lm.linear_value_head_dim
    key_head = 2 * (lm.linear_key_head_dim + value_rows + per_key)  # q, k, v, z, b, a
    yield "linear_value_head_dim: value heads together", heads * value_rows // tp
    yield "linear_num_key_heads: rows of in_proj", heads * key_head // tp


DELTA_NET = LayerKind(
    letter="G",
    title="gated DeltaNet",
    role="mixer",
    key="mixer",
    module="megatron_mm.model.layers.gdn.layer.GatedDeltaNet",
    flops=_flops,
    mixing=delta_rule,
    executed_mixing="megatron_mm.model.layers.gdn.chunks.delta_rule_flops",
    check=_check,
    fp8_features=_fp8_features,
    lora=("in_proj", "out_proj"),
)

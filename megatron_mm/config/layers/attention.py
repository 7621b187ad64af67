"""`*`: softmax attention with grouped queries, rotary embedding and an output gate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_mm.config.layers.counting import Counter, Linear
from megatron_mm.config.layers.kinds import LayerKind
from megatron_mm.config.rules import divides, require

if TYPE_CHECKING:
    from megatron_mm.config.settings import RunConfig
    from megatron_mm.config.settings_model import LanguageConfig


def linears(lm: LanguageConfig) -> tuple[Linear, Linear]:
    """linear_qkv (query and gate, key and value) and linear_proj."""
    heads, groups = (n * lm.kv_channels for n in (lm.num_attention_heads, lm.num_query_groups))
    return (lm.hidden_size, 2 * (heads + groups)), (heads, lm.hidden_size)


def scores_and_mixtures(lm: LanguageConfig, pairs: float) -> float:
    """FLOPs of this many pairs (query, key)."""
    return 4.0 * pairs * lm.num_attention_heads * lm.kv_channels


def _flops(counter: Counter) -> bool:
    work, lm = counter.work, counter.run.model.language
    forward = scores_and_mixtures(lm, work.attention_pairs)
    mixing = forward, work.attention_backward * forward
    return counter.mixer("attention", *linears(lm), mixing)


def _check(run: RunConfig) -> None:
    lm, parallel = run.model.language, run.parallel
    divides("num_attention_heads", lm.num_attention_heads, "num_query_groups", lm.num_query_groups)
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    per_group = lm.num_attention_heads // lm.num_query_groups
    for ranks in (tp, tp * cp):
        per_rank = lm.num_attention_heads // ranks
        require(
            per_rank % per_group == 0 or per_group % per_rank == 0,
            "num_query_groups",
            lm.num_query_groups,
            f"one whose {per_group} heads a group divide, or are divided by, the {per_rank} heads "
            f"of a rank",
        )
    divides("kv_channels", lm.kv_channels, "heads of a query group", per_group)
    rotary = lm.kv_channels * lm.rotary_percent
    require(
        0 < lm.rotary_percent <= 1 and rotary == int(rotary) and rotary % 2 == 0,
        "rotary_percent",
        lm.rotary_percent,
        f"a share of kv_channels {lm.kv_channels} that is an even number of features "
        f"(this one is {rotary:g})",
    )


def _fp8_features(run: RunConfig) -> Iterator[tuple[str, int]]:
    lm, tp = run.model.language, run.parallel.tensor_model_parallel_size
    heads, groups, width = lm.num_attention_heads, lm.num_query_groups, lm.kv_channels
    yield "kv_channels: attention's heads together", heads * width // tp
    yield "kv_channels: rows of linear_qkv", 2 * (heads + groups) * width // tp


ATTENTION = LayerKind(
    letter="*",
    title="attention",
    role="mixer",
    key="mixer",
    module="megatron_mm.model.layers.attention.GatedAttention",
    flops=_flops,
    check=_check,
    fp8_features=_fp8_features,
    lora=("linear_qkv", "linear_proj"),
)

"""`C`: a mixture of experts whose tokens may be handed to further experts of the same layer.

Proposed here. Nearest relatives: Chain-of-Experts (arXiv 2506.18945), whose rounds are
unconditional, and depth by token (Mixture-of-Depths, 2404.02258).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from megatron_mm.config.fields import Bounds, NonNegativeFloat, PositiveInt
from megatron_mm.config.layers import experts
from megatron_mm.config.layers.counting import Counter
from megatron_mm.config.layers.kinds import LayerKind
from megatron_mm.config.rules import require

if TYPE_CHECKING:
    from megatron_mm.config.settings import RunConfig
    from megatron_mm.config.settings_model import ModelConfig

Share = Annotated[float, Bounds(ge=0, le=1)]


@dataclass
class CascadeSettings:
    """Settings of letter `C`."""

    delegate_topk: PositiveInt = 2
    """Experts of the second hop, for each token that is handed over."""
    delegate_price: NonNegativeFloat = 2e-5
    """Weight in the loss of the sum of all tokens' gates, from 0 to 1 each; a token counts as much
    as a supervised one of its sample. The demo's model ends with 9 to 13 % of its tokens handed
    over at 2e-5, with 1 % at 1e-4."""
    delegate_price_warmup: Share = 0.5
    """Share of train_iters over which the price rises from 0, in equal steps: a price that is due
    before the second hop has learnt anything shuts every gate. 0: whole from the first step."""
    delegate_hard_from: Share = 0.5
    """Share of train_iters after which the gate is hard: tokens whose gate is above 1/2 are handed
    over. Before, all are, with the gate as their weight. 0: hard from the first step; 1: the run
    never makes it hard. A gate that was hard before stays so."""
    delegate_distinct: bool = False
    """Whether the second hop leaves out a token's experts of the first."""
    delegate_gate_bias: Annotated[float, Bounds(ge=-100, le=100)] = 0.0
    """Bias of the gate before training: 0 for gates around 1/2."""
    delegate_planned_share: Share = 1.0
    """Share of tokens handed over that plans, FLOPs and the balanced pipeline split count with; 1
    is that of a soft gate."""
    delegate_input: Literal["result", "stream"] = "result"
    """Input of the second hop: `result` is the stream with the first hop's result added; `stream`,
    without it, is a control."""
    delegate_random_share: Share | None = None
    """A control: positions that are handed over by chance once the gate is hard, as a share of all,
    whatever their gate. Which ones follows from place, layer and seed, for all samples alike."""


def second_hop_share(run: RunConfig) -> float:
    """The share of tokens handed over that plans count with."""
    settings = run.model.layer_settings("C")
    share = settings.delegate_random_share
    return settings.delegate_planned_share if share is None else share


def _hops(model: ModelConfig) -> tuple[int, ...]:
    return model.language.moe_router_topk, model.layer_settings("C").delegate_topk


def _flops(counter: Counter) -> bool:
    """`E`'s, the gate of all tokens, and router and experts of those that are handed over."""
    flows = experts.flops(counter)
    lm, tokens = counter.run.model.language, counter.work.tokens
    handed = tokens * second_hop_share(counter.run)
    given = counter.flows or flows  # `flows` holds the norm before it
    for outputs, rows in ((1, tokens), (lm.num_experts, handed)):
        linear = lm.hidden_size, outputs
        given |= counter.linear("router", linear, rows, "router", flows=given, spare="weight")
    inside = given or counter.trains("experts")
    rows = handed * counter.run.model.layer_settings("C").delegate_topk
    experts.experts(counter, rows, inside if counter.work.executed else given, inside)
    return inside


def _check(run: RunConfig) -> None:
    experts.check(run)
    lm, settings = run.model.language, run.model.layer_settings("C")
    left = lm.num_experts - lm.moe_router_topk * settings.delegate_distinct
    beside = f" - moe_router_topk {lm.moe_router_topk} (delegate_distinct)"
    require(
        settings.delegate_topk <= left,
        "delegate_topk",
        settings.delegate_topk,
        f"1 to the {left} experts that are left, num_experts {lm.num_experts}"
        + (beside if settings.delegate_distinct else ""),
    )
    require(
        run.parallel.moe_token_dispatcher_type == "alltoall",
        "moe_token_dispatcher_type",
        run.parallel.moe_token_dispatcher_type,
        "'alltoall' with letter C",
    )


# ---- transformers' text config: keys of our own beside a family's

LAYERS_KEY, SETTINGS_KEY = "cascade_layers", "cascade"


def _hf_config(model: ModelConfig) -> dict[str, Any]:
    from megatron_mm.config.pattern import parse_pattern  # which asks the registry for this kind

    layers = parse_pattern(model.hybrid_layer_pattern)
    return {
        LAYERS_KEY: [layer.number for layer in layers if layer.kind == "C"],
        SETTINGS_KEY: asdict(model.layer_settings("C")),
    }


def _hf_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name for field in fields(CascadeSettings)}
    return {k: v for k, v in (config.get(SETTINGS_KEY) or {}).items() if k in known}


CASCADE = LayerKind(
    letter="C",
    title="cascaded experts",
    role="ffn",
    key="moe",
    module="megatron_mm.model.layers.cascade.CascadedExperts",
    flops=_flops,
    routed=True,
    hops=_hops,
    hops_differ=lambda model: model.layer_settings("C").delegate_distinct,
    reads_stream=True,
    grows="E",
    settings=CascadeSettings,
    check=_check,
    fp8_features=experts.fp8_features,
    recompute="moe",
    lora=experts.LORA,
    hf_rows="megatron_mm.model.families.qwen3_next.names.DELEGATE",
    hf_config=_hf_config,
    hf_keys=(LAYERS_KEY, SETTINGS_KEY),
    hf_claims=lambda config, layer: layer in (config.get(LAYERS_KEY) or ()),
    hf_settings=_hf_settings,
)

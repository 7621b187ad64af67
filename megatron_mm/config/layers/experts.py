"""`E`: a mixture of routed experts with one gated shared expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_mm.config.layers.counting import Counter, Linear
from megatron_mm.config.layers.kinds import LayerKind
from megatron_mm.config.rules import divides, expert_tensor_parallel_size, require

if TYPE_CHECKING:
    from megatron_mm.config.settings import RunConfig


def flops(counter: Counter) -> bool:
    """Router, chosen experts, the shared one and its gate. Halves of a gated MLP are one linear.

    The chosen experts are one function, which takes the gradients of all it was given if it takes
    any.
    """
    lm, tokens = counter.run.model.language, counter.work.tokens
    hidden = lm.hidden_size
    given = counter.normed()
    router = hidden, lm.num_experts
    flows = counter.linear("router", router, tokens, "router", flows=given, spare="weight")
    inside = flows or given or counter.trains("experts")
    asked = inside if counter.work.executed else given  # the input of the first is the token
    experts(counter, tokens * lm.moe_router_topk, asked, inside)
    shared = given
    for linear in _gated_mlp(hidden, lm.moe_shared_expert_intermediate_size):
        shared = counter.linear("experts", linear, tokens, flows=shared, adapter=True)
    counter.linear("experts", (hidden, 1), tokens, flows=given, spare="none")
    return inside or shared or counter.trains("language")


def experts(counter: Counter, rows: float, asked: bool, inside: bool) -> None:
    """Counts routed experts that compute so many rows.

    Args:
        asked: whether gradients of the rows are computed.
        inside: whether those between the linears are.
    """
    lm = counter.run.model.language
    into, out = _gated_mlp(lm.hidden_size, lm.moe_ffn_hidden_size)
    counter.linear("experts", into, rows, "experts", flows=asked)
    counter.linear("experts", out, rows, "experts", flows=inside)


def _gated_mlp(hidden: int, width: int) -> tuple[Linear, Linear]:
    return (hidden, 2 * width), (width, hidden)


def check(run: RunConfig) -> None:
    lm, parallel = run.model.language, run.parallel
    require(
        2 <= lm.moe_router_topk <= lm.num_experts,
        "moe_router_topk",
        lm.moe_router_topk,
        # The weights of the chosen sum to 1, so the router of a single one would learn nothing.
        f"2 to num_experts {lm.num_experts}",
    )
    ep = parallel.expert_model_parallel_size
    divides("num_experts", lm.num_experts, "expert_model_parallel_size", ep)
    expert_tp = expert_tensor_parallel_size(parallel)
    divides("moe_ffn_hidden_size", lm.moe_ffn_hidden_size, "expert_tensor_parallel_size", expert_tp)
    divides(
        "moe_shared_expert_intermediate_size",
        lm.moe_shared_expert_intermediate_size,
        "tensor_model_parallel_size",
        parallel.tensor_model_parallel_size,
    )


def fp8_features(run: RunConfig) -> Iterator[tuple[str, int]]:
    lm, tp = run.model.language, run.parallel.tensor_model_parallel_size
    shared = lm.moe_shared_expert_intermediate_size // tp
    yield "moe_shared_expert_intermediate_size", shared
    expert_tp = expert_tensor_parallel_size(run.parallel)
    yield "moe_ffn_hidden_size", lm.moe_ffn_hidden_size // expert_tp


LORA = ("linear_fc1", "linear_fc2")  # of the shared expert
EXPERTS = LayerKind(
    letter="E",
    title="mixture of experts",
    role="ffn",
    key="moe",
    module="megatron_mm.model.layers.moe.MixtureOfExperts",
    flops=flops,
    routed=True,
    check=check,
    fp8_features=fp8_features,
    recompute="moe",
    lora=LORA,
)

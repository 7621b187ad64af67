"""The `E` layer: megatron-core's MoE layer (router, dispatcher, shared expert) around our
stacked experts."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mm.model.backends.interface import Backend
from megatron_mm.model.context import StreamContext
from megatron_mm.model.decode import DecodeCache
from megatron_mm.model.expert_scope import ExpertScope, signed
from megatron_mm.model.layers.experts import GroupedExperts
from megatron_mm.model.layers.interface import BuildContext
from megatron_mm.parallel.param_layout import normal, place
from megatron_mm.report.metrics import MUTED, Metrics


class Router(TopKRouter):
    """megatron-core's router, with the load-balancing loss weighted like the main loss.

    Gradients are divided by the number of supervised tokens of the whole batch at the end, or by
    what else the objective counts, such as pairs. megatron-core weights a microbatch's balancing
    loss by this rank's unpadded tokens, which differ between ranks when one holds the padding, and
    outnumber the supervised ones when prompts are long. Weighted by the microbatch's share of that
    number, the coefficient means the same on every layout.
    """

    loss_weight: torch.Tensor | float = 0.0  # `Microbatch.loss_weight` of the current one
    metrics: Metrics = MUTED  # of the current pass

    def attach_and_log_load_balancing_loss(
        self, activation, aux_loss_coeff, aux_loss, aux_loss_name, reduce_group, **_
    ):
        # 1 is perfect balance. Every rank of the group has a part of one layer's loss.
        share = 1 / reduce_group.size()
        self.metrics.ratio("moe/load_balancing_loss", aux_loss / aux_loss_coeff, share)
        # Every rank of tp_cp has its own positions' share of the loss.
        return MoEAuxLossAutoScaler.apply(activation, aux_loss * self.loss_weight)


class SharedExpert(SharedExpertMLP):
    """megatron-core's shared expert, which waits for its own gate.

    Where it is overlapped, the dispatcher calls its parts and never the module, so the hook by
    which DDP waits for the gather of the gate (`overlap_param_gather`) would not run.
    """

    def pre_forward_comm(self, input: torch.Tensor, wait_current_stream: bool = True) -> None:
        for hook in self._forward_pre_hooks.values():
            hook(self, (input,))
        super().pre_forward_comm(input, wait_current_stream)


class MixtureOfExperts(MoELayer):
    """megatron-core's layer with the layout of its own parameters described.

    Args:
        layer: global layer number, from 0.
        std, out_std: standard deviations of the input and output projections at the start.
    """

    State = None

    def __init__(
        self,
        config: TransformerConfig,
        pg: ProcessGroupCollection,
        layer: int,
        std: float,
        out_std: float,
        backend: Backend,
    ):
        shared = partial(SharedExpert, submodules=backend.shared_expert)
        experts = partial(backend.experts, std=std, out_std=out_std)
        super().__init__(
            config,
            MoESubmodules(experts=experts, shared_experts=shared, router=Router),
            layer_number=layer + 1,  # megatron-core counts from 1
            pg_collection=pg,
        )
        self.set_layer_number(layer + 1)
        sizes = [group.size() for group in (pg.tp, pg.ep, pg.expt_tp)]
        self.scope: ExpertScope | None = None  # of the current pass
        ours = isinstance(self.experts, GroupedExperts)
        self.alone = ours and max(sizes) == 1
        # With overlap the shared expert leaves its collectives to the dispatcher, and FP8 is in the
        # experts' `forward` alone.
        overlaps = config.moe_shared_expert_overlap and pg.tp.size() > 1
        self.steps_alone = ours and not overlaps and config.fp8 is None
        # The ranks that share the experts; the first of them that is here.
        self.sharers, self.first = pg.tp_ep, pg.ep.rank() * self.num_local_experts
        sequence_parallel = config.sequence_parallel
        place(self.router.weight, normal(std), partial_gradient=sequence_parallel)
        place(self.shared_experts.gate_weight, normal(std), partial_gradient=sequence_parallel)
        fc1, fc2 = self.shared_experts.linear_fc1.weight, self.shared_experts.linear_fc2.weight
        half = fc1.shape[0] // 2
        place(fc1, normal(std), split={1: pg.tp}, view=(2, half, fc1.shape[1]))
        place(fc2, normal(out_std), split={1: pg.tp})

    @classmethod
    def build(cls, given: BuildContext) -> MixtureOfExperts:
        number = given.layer.known_number
        return cls(given.config, given.pg, number, given.std, given.out_std, given.backend)

    def run(self, hidden_t1H: torch.Tensor, context: StreamContext, state: None) -> torch.Tensor:
        """See `LayerModule.run`."""
        if self.steps_alone and context.cache is not None and context.cache.stepping:
            return self.step(hidden_t1H, context, context.cache)
        return self(hidden_t1H, context)

    def forward(self, hidden_t1H: torch.Tensor, context: StreamContext) -> torch.Tensor:
        """[t, 1, H] -> [t, 1, H]"""
        self.router.loss_weight = context.loss_weight
        self.router.metrics = context.metrics
        routing, index = context.routing, self.layer_number - 1
        # megatron-core's router asks this object instead of taking the best k itself.
        self.router.router_replay = routing and routing.of_layer(
            index, context.recomputing, context.metrics
        )
        if context.scope is not None and not isinstance(self.experts, GroupedExperts):
            raise ValueError(
                f"layer {index} of experts is a {type(self.experts).__name__}, which knows no "
                "expert scope; derive it from GroupedExperts, or train without expert_scope"
            )
        self.scope = context.scope
        self.experts.scoped = context.scope is not None
        if self.alone:
            hidden_t1H = self._in_place(hidden_t1H, context.padding_1t)
        else:
            hidden_t1H = super().forward(hidden_t1H, padding_mask=context.padding_1t)[0]
            # Kept until the next batch, these would keep all that a repeated pass saved before
            # them: its graph is never run backward, so nothing else frees it.
            self.token_dispatcher.probs = self.token_dispatcher.routing_map = None
        # Or they would hold the batch until the next one.
        self.router.router_replay, self.router.metrics = None, MUTED
        self.scope = None
        return hidden_t1H

    def route(
        self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """megatron-core's (probabilities, choice) [t, E]; with an expert scope the former carry who
        teaches whom to the experts."""
        probs_tE, chosen_tE = super().route(hidden_states, padding_mask)
        if self.scope is not None:
            teaches_tE = self.scope.teaches(self.layer_number - 1)
            taught_t, rows_t = (chosen_tE & teaches_tE).sum(1), chosen_tE.sum(1)
            ratio, begins_t = self.router.metrics.ratio, self.scope.begins_t
            ratio("moe/taught_share", taught_t.sum(), rows_t.sum())
            ratio("moe/taught_share_first", (taught_t * begins_t).sum(), (rows_t * begins_t).sum())
            probs_tE = signed(probs_tE, teaches_tE)
        return probs_tE, chosen_tE

    def _in_place(self, hidden_t1H: torch.Tensor, padding_1t: torch.Tensor | None) -> torch.Tensor:
        """The layer where every expert is on this rank, without megatron-core's dispatcher: the
        same sums in the same order, forward and backward, and on a GPU no wait for the sizes."""
        padding_t1 = None if padding_1t is None else padding_1t.t()
        shared_t1H = self.shared_experts(hidden_t1H)
        probs_tE, chosen_tE = self.route(hidden_t1H, padding_t1)
        k = self.config.moe_router_topk
        mixed_tH = self.rows_here(hidden_t1H.flatten(0, 1), probs_tE, chosen_tE, k)
        return mixed_tH.view_as(hidden_t1H) + shared_t1H

    def rows_here(
        self, flat_tH: torch.Tensor, probs_tE: torch.Tensor, chosen_tE: torch.Tensor, k: int
    ) -> torch.Tensor:
        """The routed experts of rows with k each, [t, H], all of them on this rank."""
        # Every position has k experts, so how many rows there are need not be counted.
        rows = len(flat_tH) * k
        expert_R, token_R = chosen_tE.t().nonzero_static(size=rows).unbind(1)  # sorted by expert
        rows_RH, _ = self.experts(
            flat_tH.index_select(0, token_R), chosen_tE.sum(0), probs_tE[token_R, expert_R]
        )
        return torch.zeros_like(flat_tH).index_add_(0, token_R, rows_RH)

    def step(
        self, hidden_r1H: torch.Tensor, context: StreamContext, cache: DecodeCache
    ) -> torch.Tensor:
        """The layer for one token of every row, without a dispatcher: the sums of `_in_place` in
        the same order, from the chosen experts alone and not from tables of all.

        Ranks that share the experts compute their part for the rows of all of them, which are as
        many on each. A step has few rows, so that costs less than to wait until it is known how
        many go where.
        """
        shared_r1H = self._shared(hidden_r1H)
        chosen = self._choose(hidden_r1H, context)
        mixed_RH = self.rows_of_step(hidden_r1H.flatten(0, 1), *chosen, cache)
        return mixed_RH.view_as(hidden_r1H).add_(shared_r1H)

    def rows_of_step(
        self,
        flat_RH: torch.Tensor,
        probs_Rk: torch.Tensor,
        experts_Rk: torch.Tensor,
        cache: DecodeCache,
        *,
        nowhere: bool = False,
    ) -> torch.Tensor:
        """The routed experts of one token of every row, [R, H].

        Args:
            nowhere: some rows go to no expert; theirs is `num_experts`.
        """
        sharers = self.sharers
        if sharers.size() > 1:
            both = torch.cat((probs_Rk, experts_Rk.to(probs_Rk.dtype)), 1)
            flat_RH, both = (
                gather_from_sequence_parallel_region(x, group=sharers) for x in (flat_RH, both)
            )
            probs_Rk, experts_Rk = both.chunk(2, dim=1)
            experts_Rk = experts_Rk.long()
        here = self.num_local_experts
        elsewhere = nowhere or here < self.router.num_experts
        if elsewhere:
            experts_Rk = experts_Rk - self.first
            there_Rk = (experts_Rk < 0) | (experts_Rk > here)
            experts_Rk = experts_Rk.masked_fill_(there_Rk, here)  # behind all that are here
        sorted_K, place_K = experts_Rk.flatten().sort(stable=True)  # by expert, then by token
        token_K = place_K.div(experts_Rk.shape[1], rounding_mode="floor")
        after_E = cache.kept(
            ("experts", here), lambda: torch.arange(1, here + 1, device=flat_RH.device)
        )
        rows_KH = self.experts.step(
            flat_RH.index_select(0, token_K),
            torch.searchsorted(sorted_K, after_E, out_int32=True),
            probs_Rk.flatten().index_select(0, place_K),
        )
        if elsewhere:
            rows_KH.masked_fill_((sorted_K == here).unsqueeze(1), 0.0)  # nobody computed them
        mixed_RH = torch.zeros_like(flat_RH).index_add_(0, token_K, rows_KH)
        if sharers.size() > 1:
            mixed_RH = reduce_scatter_to_sequence_parallel_region(mixed_RH, group=sharers)
        return mixed_RH

    def _choose(
        self, hidden_r1H: torch.Tensor, context: StreamContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights, experts) [r, k] that the router chooses in evaluation."""
        router, routing = self.router, context.routing
        return topk_routing_with_score_function(
            router.gating(hidden_r1H).flatten(0, 1),
            router.topk,
            score_function=router.score_function,
            router_replay=routing and routing.of_layer(self.layer_number - 1, False, MUTED),
            dense_output=True,
        )

    def _shared(self, hidden_r1H: torch.Tensor) -> torch.Tensor:
        """The shared expert, as megatron-core computes it."""
        shared = self.shared_experts
        gate, up = shared.linear_fc1(hidden_r1H)[0].chunk(2, dim=-1)
        mixed, _ = shared.linear_fc2(F.silu(gate).mul_(up))
        return mixed.mul_(F.linear(hidden_r1H, shared.gate_weight).sigmoid_())

"""The `C` layer: experts, and a second hop to further experts of the same layer for the tokens that
a gate hands over. With x the normed stream h, y the result of an `E` on x, and E_e its experts:

    z = norm2(h + y)                         gate = sigmoid(w z + b)
    out = y + m * scale o sum over the k2 best e of r = W2 z of gate * q_e * E_e(z)

q is the softmax of r over the chosen (of all experts with k2 = 1, or W2 would have no gradient); m
is 1 while the gate is soft, then 1 where the gate is above 1/2. The scale starts at zero, so that a
new `C` computes what its `E` does. W2 starts as the first router, norm2 as the layer's norm.

Only the rows that are handed over are gathered, dispatched and computed. Every rank takes part with
however few it has, and every parameter in every backward pass.

Shapes: t positions on this rank, n of them handed over, E experts, k of them chosen in this hop.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, router_gating_linear
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import nn

from megatron_mm.model.context import StreamContext
from megatron_mm.model.decode import DecodeCache
from megatron_mm.model.expert_scope import signed
from megatron_mm.model.layers.interface import BuildContext, Scheduled
from megatron_mm.model.layers.moe import MixtureOfExperts
from megatron_mm.model.layers.norms import RMSNorm
from megatron_mm.model.routing import FREE, NOT_HANDED, Choice
from megatron_mm.parallel.param_layout import Initializer, constant, normal, place

# (rows [n, H], weights [n, k], experts [n, k]) -> their experts' sum, [n, H]
Mix = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
GOLDEN = 2654435761  # 2^32 over the golden ratio: multiples of it spread evenly (Knuth, 6.4)


class Scores(nn.Module):
    """x W^T + b in the precision of routers."""

    def __init__(
        self, given: BuildContext, outputs: int, init: Initializer, bias: float | None = None
    ):
        super().__init__()
        config, name = given.config, given.run.model.language.moe_router_dtype
        self.precision = {"fp32": torch.float32, "fp64": torch.float64}[name]
        shape, dtype = (outputs, config.hidden_size), config.params_dtype
        self.weight, self.bias = nn.Parameter(torch.empty(shape, dtype=dtype)), None
        place(self.weight, init, partial_gradient=config.sequence_parallel)
        if bias is not None:
            self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype))
            place(self.bias, constant(bias), partial_gradient=config.sequence_parallel)

    def forward(self, x_tH: torch.Tensor) -> torch.Tensor:
        if not len(x_tH):  # which megatron-core's function cannot reshape
            return F.linear(x_tH.to(self.precision), self.weight.to(self.precision))
        return router_gating_linear(x_tH, self.weight, self.bias, self.precision)


class Delegate(nn.Module, Scheduled):
    """The second hop: who is handed over, to which experts, with which weight.

    Attributes:
        hard: 1 while the gate is hard, else 0. It never learns: `at_progress` sets it, and it
            travels with the weights, so that whoever loads them hands over as the run did.
        price: of a gate of 1, in the next step.
        pick: bool [t] -> the indices of those that are handed over; a plan has its own.
    """

    def __init__(self, given: BuildContext):
        super().__init__()
        config, self.settings = given.config, given.settings
        self.k, self.index = self.settings.delegate_topk, given.layer.known_number
        self.seed = given.run.training.seed
        self.first, self.tp_cp, self.tp = config.moe_router_topk, given.pg.tp_cp, given.pg.tp
        self.aux_loss_coeff = config.moe_aux_loss_coeff
        partial, dtype = config.sequence_parallel, config.params_dtype
        eps = given.run.model.language.layernorm_epsilon
        self.norm = RMSNorm(config.hidden_size, eps, partial_gradient=partial, dtype=dtype)
        place(
            self.norm.weight,
            constant(0.0),
            partial_gradient=partial,
            copies=("inner.delegate.norm.weight", "norm.weight"),
        )
        experts = config.num_moe_experts
        assert experts is not None  # a layer of experts has some
        self.gate = Scores(given, 1, normal(given.std), self.settings.delegate_gate_bias)
        self.router = Scores(given, experts, normal(given.std))
        place(
            self.router.weight,
            normal(given.std),
            partial_gradient=partial,
            copies=("delegate.router.weight", "router.weight"),
        )
        self.scale = nn.Parameter(torch.empty(config.hidden_size, dtype=dtype))
        place(self.scale, constant(0.0), partial_gradient=partial)
        self.hard = nn.Parameter(torch.empty(1, dtype=dtype), requires_grad=False)
        begin = constant(float(self.settings.delegate_hard_from <= 0))
        place(self.hard, begin, set_by_run=True)
        self.price = self.settings.delegate_price
        self.pick: Callable[[torch.Tensor], torch.Tensor] = lambda handed_t: (
            handed_t.nonzero().flatten()
        )

    def at_progress(self, done: float) -> None:
        """See `Scheduled`. A gate that is hard stays so, in a run that begins with it, too: what it
        has learnt is who needs a second hop."""
        begin = self.settings.delegate_hard_from
        if begin <= done and begin < 1:
            self.hard.data.fill_(1.0)
        rises = self.settings.delegate_price_warmup
        self.price = self.settings.delegate_price * (min(1.0, done / rises) if rises else 1.0)

    def forward(
        self,
        stream_t1H: torch.Tensor,
        result_t1H: torch.Tensor,
        first_tE: torch.Tensor,
        context: StreamContext,
        mix: Mix,
    ) -> torch.Tensor:
        """Returns the first hop's result and what the second adds, [t, 1, H].

        Args:
            stream_t1H, result_t1H: h and y.
            first_tE: bool, the first hop's choice.
        """
        asked = self._asked(context)
        z_tH, gate_t = self._read(stream_t1H, result_t1H, context)
        given_tk = None if asked is None else asked.given_second(self.first)
        padding_t = None if context.padding_1t is None else context.padding_1t.flatten()
        if context.nothing_real:
            padding_t = torch.ones_like(gate_t, dtype=torch.bool)
        handed_t = self._handed(gate_t, context, padding_t, given_tk)
        learns = self.training and torch.is_grad_enabled() and not context.nothing_real
        if learns:
            gate_t = self._priced(gate_t, padding_t, context)
        rows_n = self.pick(handed_t)
        x_nH = z_tH.index_select(0, rows_n)
        q_nk, experts_nk, scores_nE = self._choose(
            x_nH,
            asked,
            first_tE.index_select(0, rows_n),
            None if given_tk is None else given_tk.index_select(0, rows_n),
        )
        if asked:
            chosen_tk = torch.full_like(handed_t, NOT_HANDED, dtype=torch.int64)
            chosen_tk = chosen_tk.unsqueeze(1).repeat(1, self.k)
            asked.record_second(self.first, chosen_tk.index_copy_(0, rows_n, experts_nk))
        weights_nk = q_nk * gate_t.index_select(0, rows_n).unsqueeze(1)
        if learns:
            counted = scores_nE, experts_nk, first_tE, padding_t
            weights_nk = self._balanced(weights_nk, *counted, context)
        if context.scope is not None:
            teaches_nE = context.scope.teaches(self.index).index_select(0, rows_n)
            weights_nk = signed(weights_nk, teaches_nE.gather(1, experts_nk))
        found_nH = mix(x_nH, weights_nk, experts_nk)
        added = result_t1H.flatten(0, 1).index_add(0, rows_n, found_nH * self.scale)
        return added.view_as(result_t1H)

    def step(
        self,
        stream_r1H: torch.Tensor,
        result_r1H: torch.Tensor,
        experts_rk: torch.Tensor,
        context: StreamContext,
        mix: Mix,
    ) -> torch.Tensor:
        """`forward` for one token of every row, whose sizes depend on nothing: rows that are not
        handed over go to no expert.

        Args:
            experts_rk: the first hop's choice.
        """
        asked = self._asked(context)
        z_rH, gate_r = self._read(stream_r1H, result_r1H, context)
        handed_r1 = self._handed(gate_r, context, None, None).unsqueeze(1)
        nobody_rE = z_rH.new_zeros(len(z_rH), len(self.router.weight), dtype=torch.bool)
        first_rE = nobody_rE.scatter(1, experts_rk, True)
        q_rk, chosen_rk, _ = self._choose(z_rH, asked, first_rE, None)
        if asked:
            asked.record_second(self.first, torch.where(handed_r1, chosen_rk, NOT_HANDED))
        nowhere = len(self.router.weight)
        weights_rk = (q_rk * gate_r.unsqueeze(1)).masked_fill(~handed_r1, 0.0)
        found_rH = mix(z_rH, weights_rk, torch.where(handed_r1, chosen_rk, nowhere))
        return result_r1H + (found_rH * self.scale).view_as(result_r1H)

    def _asked(self, context: StreamContext) -> Choice | None:
        if context.routing is None:
            return None
        return context.routing.of_layer(self.index, context.recomputing, context.metrics)

    def _read(
        self, stream_t1H: torch.Tensor, result_t1H: torch.Tensor, context: StreamContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(z [t, H], gate [t])"""
        read = stream_t1H if self.settings.delegate_input == "stream" else stream_t1H + result_t1H
        z_tH = self.norm(read, context.scale_of(self.norm)).flatten(0, 1)
        return z_tH, self.gate(z_tH).squeeze(1).sigmoid()

    def _handed(
        self,
        gate_t: torch.Tensor,
        context: StreamContext,
        padding_t: torch.Tensor | None,
        given_tk: torch.Tensor | None,
    ) -> torch.Tensor:
        """bool [t]: m. Padding is never handed over; where routes are given, they decide."""
        handed_t = gate_t > 1.5 * self.hard.to(gate_t.dtype) - 1  # 1/2, or below every gate
        if self.settings.delegate_random_share is not None:
            handed_t = self._by_chance(len(gate_t), context) | (self.hard == 0)
        if padding_t is not None:
            handed_t = handed_t & ~padding_t
        if given_tk is not None:
            given_t = given_tk[:, 0]
            handed_t = torch.where(given_t == FREE, handed_t, given_t != NOT_HANDED)
        return handed_t

    def _by_chance(self, count: int, context: StreamContext) -> torch.Tensor:
        """bool [t]: the control. It knows nothing but the place in the sample, the layer and the
        run's seed, so it is the same on every layout, in decoding and when a pass is repeated."""
        begin = self.tp.rank() * count  # of this rank's part of the context-parallel part
        places_t = context.position_ids_t[begin : begin + count]
        # Other places in every layer and of every seed.
        spread_t = (places_t + 7919 * self.index + 104729 * self.seed) * GOLDEN % 2**32
        return spread_t < self.settings.delegate_random_share * 2**32

    def _choose(
        self,
        x_nH: torch.Tensor,
        asked: Choice | None,
        first_nE: torch.Tensor,
        given_nk: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(weights q [n, k], experts [n, k], softmax of all scores [n, E])"""
        allowed_nE = logits_nE = self.router(x_nH)
        if self.settings.delegate_distinct:
            allowed_nE = allowed_nE.masked_fill(first_nE, -torch.inf)
        if asked and asked.forbidden is not None:
            allowed_nE = allowed_nE.masked_fill(asked.forbidden, -torch.inf)
        experts_nk = allowed_nE.topk(self.k, dim=1).indices
        if given_nk is not None:
            experts_nk = torch.where(given_nk >= 0, given_nk, experts_nk)
        scores_nE = logits_nE.softmax(1)
        if self.k == 1:
            return scores_nE.gather(1, experts_nk), experts_nk, scores_nE
        return logits_nE.gather(1, experts_nk).softmax(1), experts_nk, scores_nE

    def _priced(
        self, gate_t: torch.Tensor, padding_t: torch.Tensor | None, context: StreamContext
    ) -> torch.Tensor:
        """The gate, with the price of handing over hung on it: a sum over positions, so the same on
        every layout and in every packing. A position counts as much as a supervised token of its
        sample does in the loss, so a price means the same whatever the objective counts."""
        paid_t = gate_t if padding_t is None else gate_t.masked_fill(padding_t, 0.0)
        if context.position_weight_t is not None:
            paid_t = paid_t * context.position_weight_t
        price = self.price * paid_t.sum()
        context.metrics.loss_term("moe/delegate_price", price)
        return MoEAuxLossAutoScaler.apply(gate_t, price)

    def _balanced(
        self,
        weights_nk: torch.Tensor,
        scores_nE: torch.Tensor,
        experts_nk: torch.Tensor,
        first_tE: torch.Tensor,
        padding_t: torch.Tensor | None,
        context: StreamContext,
    ) -> torch.Tensor:
        """The weights, with the balancing loss of the tokens that are handed over hung on them:
        Switch's, as in the first hop, times their share of all tokens. So a token counts as much as
        in the first hop, and none handed over is no special case."""
        experts = scores_nE.shape[1]
        if padding_t is not None:
            first_tE = first_tE & ~padding_t.unsqueeze(1)
        second_E = torch.zeros(experts, dtype=torch.int64, device=weights_nk.device)
        ones = torch.ones_like(experts_nk).flatten()
        second_E = second_E.index_add_(0, experts_nk.flatten(), ones)
        counts_2E = torch.stack((first_tE.sum(0), second_E))
        metrics = context.metrics
        if self.tp_cp.size() > 1:
            dist.all_reduce(counts_2E, group=self.tp_cp)
        tokens, handed = counts_2E[0].sum() / self.first, counts_2E[1].sum() / self.k
        spread = experts * (scores_nE.sum(0) * counts_2E[1]).sum() / self.k
        loss = spread / (handed.clamp(min=1) * tokens)
        part = 1 / self.tp_cp.size()  # every rank of the group has a part of the loss
        share = handed / tokens
        metrics.ratio("moe/delegated_share", share * part, part)
        metrics.ratio("moe/delegate_balancing_loss", loss, share * part)
        both_E = counts_2E.sum(0)
        above = both_E.max() / both_E.double().mean() - 1
        metrics.mean("moe/load_violation", above, part)
        if not self.aux_loss_coeff:
            return weights_nk
        loss = self.aux_loss_coeff * loss * context.loss_weight
        return MoEAuxLossAutoScaler.apply(weights_nk, loss)


class CascadedExperts(MixtureOfExperts):
    """`MixtureOfExperts` and a second hop through its experts."""

    def __init__(self, given: BuildContext):
        number = given.layer.known_number
        super().__init__(given.config, given.pg, number, given.std, given.out_std, given.backend)
        self.delegate = Delegate(given)
        second = copy(given.config)
        # megatron-core's dispatcher counts rows as tokens times this.
        second.moe_router_topk = self.delegate.k
        self.second_dispatcher = MoEAlltoAllTokenDispatcher(
            self.num_local_experts,
            self.local_expert_indices,
            config=second,
            pg_collection=given.pg,
        )
        self.first_tE: torch.Tensor | None = None  # the first hop's choice, in the current pass

    @classmethod
    def build(cls, given: BuildContext) -> CascadedExperts:
        return cls(given)

    def run(
        self,
        hidden_t1H: torch.Tensor,
        context: StreamContext,
        state: None,
        stream_t1H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `LayerModule.run`."""
        assert stream_t1H is not None  # the kind reads it
        if self.steps_alone and context.cache is not None and context.cache.stepping:
            return self.step(hidden_t1H, context, context.cache, stream_t1H)
        return self(hidden_t1H, context, stream_t1H)

    def forward(
        self,
        hidden_t1H: torch.Tensor,
        context: StreamContext,
        stream_t1H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[t, 1, H] -> [t, 1, H]"""
        result_t1H = super().forward(hidden_t1H, context)
        first_tE, self.first_tE = self.first_tE, None
        return self.delegate(stream_t1H, result_t1H, first_tE, context, self._mix)

    def route(
        self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `MixtureOfExperts.route`."""
        probs_tE, self.first_tE = super().route(hidden_states, padding_mask)
        return probs_tE, self.first_tE

    def _mix(
        self, x_nH: torch.Tensor, weights_nk: torch.Tensor, experts_nk: torch.Tensor
    ) -> torch.Tensor:
        """The experts of the rows that are handed over, wherever they are."""
        shape = len(x_nH), self.router.num_experts
        weights_nE = weights_nk.new_zeros(shape).scatter(1, experts_nk, weights_nk)
        chosen_nE = torch.zeros(shape, dtype=torch.bool, device=x_nH.device)
        chosen_nE = chosen_nE.scatter(1, experts_nk, True)
        if self.alone:
            return self.rows_here(x_nH, weights_nE, chosen_nE, experts_nk.shape[1])
        dispatcher = self.second_dispatcher
        sent = dispatcher.dispatch_preprocess(x_nH.unsqueeze(1), chosen_nE, weights_nE)
        rows_RH, counts, weights_R = dispatcher.dispatch_postprocess(
            *dispatcher.token_dispatch(*sent)
        )
        found_RH, _ = self.experts(rows_RH, counts, weights_R)
        back = dispatcher.token_combine(dispatcher.combine_preprocess(found_RH))
        found_nH = dispatcher.combine_postprocess(back).flatten(0, 1)
        dispatcher.probs = dispatcher.routing_map = None  # see `MixtureOfExperts.forward`
        return found_nH

    def step(
        self,
        hidden_r1H: torch.Tensor,
        context: StreamContext,
        cache: DecodeCache,
        stream_r1H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `MixtureOfExperts.step`."""
        assert stream_r1H is not None
        weights_rk, experts_rk = self._choose(hidden_r1H, context)
        flat_rH = hidden_r1H.flatten(0, 1)
        mixed_rH = self.rows_of_step(flat_rH, weights_rk, experts_rk, cache)
        result_r1H = mixed_rH.view_as(hidden_r1H).add_(self._shared(hidden_r1H))

        def mix(x_rH: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
            return self.rows_of_step(x_rH, weights, experts, cache, nowhere=True)

        return self.delegate.step(stream_r1H, result_r1H, experts_rk, context, mix)

"""Requests to the routers beside their own choice: to use given routes, to draw with given noise,
to record the routes they take, to leave experts out, to learn from a term of their own.

Routing is replayed for RL: R2 uses the routes of the trainer's own first pass (Zheng et al. 2025,
arXiv 2507.18071), R3 those of the rollout (Ma et al. 2025, arXiv 2510.11370). Both are the same
here: `Microbatch.routes`. They belong to the microbatch and reach its layers through its
own context, so a pipeline schedule that interleaves microbatches, or a block computed again,
cannot meet another one's (megatron-core's RouterReplay holds one target for the process).

A layer of experts is known by its *moe index*, the number of its transformers layer from 0. A layer
whose experts hand tokens on (letter C) chooses in two hops; a row of its routes has the experts of
the first, then those of the second. All routes of a model have one width k (`config.route_width`);
what a layer does not use of it is `NOT_HANDED`.

Shapes: T stream, t positions whose hidden state this rank holds (`parallel.sequence.shard`), k
experts chosen at a position in all hops, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch.autograd.function import once_differentiable

from megatron_mm.data.batch import Microbatch
from megatron_mm.parallel.sequence import gather_shards, shard, take
from megatron_mm.report.metrics import Metrics

Routes = dict[int, torch.Tensor]  # moe index -> int16 [positions, k]
FREE = -1  # in a row of routes: the layer chooses these itself
NOT_HANDED = -2  # the token is not handed to the second hop


class RouterTerm(Protocol):
    def __call__(
        self,
        logits_tE: torch.Tensor,
        batch: Microbatch,
        moe_index: int,
        positions: range,
        metrics: Metrics,
    ) -> torch.Tensor | None:
        """The term that one layer's router adds to the loss of a microbatch; None for nothing. It
        is about the first hop: that is the router, and the routes that the batch is given with.

        Args:
            logits_tE: of the router, before anything is forbidden.
            positions: those of the stream that the t rows are.
            metrics: takes whatever is worth a number; nothing when a block is computed again.
        Returns:
            a scalar with gradient to the logits: a sum over these positions, in the unit of
            the objective's loss, since both are divided by the same number at the end. Called
            again with equal logits when a block is computed again, so it must be pure.
        """
        ...


def check_routes(
    routes: Mapping, hops: Mapping[int, tuple[int, ...]], tokens: int, k: int, experts: int
):
    """Raises ValueError for given routes, on the CPU, that a stage with these layers cannot use: an
    expert named twice or unknown would not fail where it is, but far from there or never.

    Args:
        hops: moe index -> how many experts each hop takes.
        k: width of the rows.
    """
    for index, (first, *second) in hops.items():
        if index not in routes:
            raise ValueError(
                f"routes for {len(routes)} layers of experts, layer {index} is not among them; "
                "give it rows of -1 to let it choose freely"
            )
        given = routes[index]
        if tuple(given.shape) != (tokens, k):
            raise ValueError(
                f"routes of layer {index} have shape {tuple(given.shape)}, the stream of {tokens} "
                f"tokens with {k} experts each needs {(tokens, k)}; record them for this batch"
            )
        odd = ~_names_experts(given[:, :first], experts) & (given[:, :first] != FREE).any(1)
        words = f"a row names {first} different experts from 0 to {experts - 1}, or is -1"
        if k > first:
            rest = given[:, first:]
            unused = ((rest == NOT_HANDED) | (rest == FREE)).all(1)
            unused &= (rest == rest[:, :1]).all(1)
            named = _names_experts(rest, experts) if second else torch.zeros_like(unused)
            odd |= ~(unused | named)
            words += f" in the first {first} places, and in the other {k - first} "
            words += f"{k - first} different ones, or is " if second else "is "
            words += "-1, or -2 (not handed over)"
        if odd.any():
            row = int(odd.nonzero()[0])
            raise ValueError(
                f"routes of layer {index}, position {row}: {given[row].tolist()}; {words} "
                "throughout"
            )


def _names_experts(routes_Tk: torch.Tensor, experts: int) -> torch.Tensor:
    """bool [T]: each row names different experts."""
    ordered = routes_Tk.sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(1)
    return (ordered[:, 0] >= 0) & (ordered[:, -1] < experts) & ~twice


def check_forbidden(forbidden: Mapping[int, torch.Tensor], layers: int, k: int, experts: int):
    """Raises ValueError for experts that cannot be left out: fewer than k would remain, or the
    layer or the size is another model's.

    Args:
        k: `config.experts_needed`.
    """
    for index, mask in forbidden.items():
        if not 0 <= index < layers:
            raise ValueError(f"experts of layer {index} forbidden; use layers 0 to {layers - 1}")
        if mask.dtype != torch.bool or tuple(mask.shape) != (experts,):
            raise ValueError(
                f"forbidden experts of layer {index} are {mask.dtype} {tuple(mask.shape)}; "
                f"give a bool for each of the {experts} experts"
            )
        left = experts - int(mask.sum())
        if left < k:
            raise ValueError(
                f"{experts - left} of {experts} experts of layer {index} forbidden leaves {left}, "
                f"a token needs {k}; forbid at most {experts - k}"
            )


@dataclass(frozen=True)
class Routing:
    """Requests to one stage's routers for one microbatch.

    Attributes:
        width: k.
        given: int16 [t, k]; rows of -1: choose freely.
        noise: [t, E], added to the logits for the choice alone, not for the weights. With Gumbel
            noise times a temperature the k best are k draws without replacement from the softmax
            of the logits over it, in order (Kool, van Hoof and Welling 2019, arXiv 1903.06059,
            Theorem 1).
        record: filled with int16 [t, k], in the order in which the router chose: as drawn with
            noise, else the highest logit first when gradients are on and unspecified when not. The
            order changes no choice, but the last bit of the weights; replayed as recorded, it
            changes nothing.
        forbidden: bool [E], True: its logit counts as minus infinity. Given routes are used as
            they are.
        term: (logits [t, E], moe index, metrics) -> the router's own loss, added to the main one.
        taken: of a pass that will be repeated for the backward pass, filled with int16 [t, k] that
            the repetition takes again: a GPU adds rows in another order each time, and where two
            logits are nearly equal, the backward pass would mix the routes of two passes. None:
            nothing is repeated.
    """

    width: int
    given: Routes = field(default_factory=dict)
    noise: dict[int, torch.Tensor] = field(default_factory=dict)
    record: Routes | None = None
    forbidden: Routes = field(default_factory=dict)
    term: Callable[[torch.Tensor, int, Metrics], torch.Tensor | None] | None = None
    taken: Routes | None = None

    @classmethod
    def of(
        cls,
        batch: Microbatch,
        pg: ProcessGroupCollection,
        hops: Mapping[int, tuple[int, ...]],
        width: int,
        record: Routes | None,
        forbidden: Routes,
        term: RouterTerm | None,
        repeated: bool = False,
    ) -> Routing | None:
        """The requests for a microbatch on this rank; None if there are none.

        Args:
            hops: of the stage's layers, as for `check_routes`.
            width: of routes.
            repeated: layers of experts are run again in the backward pass.
        """
        asked = batch.routes, batch.route_noise, record, term
        if not forbidden and not repeated and all(thing is None for thing in asked):
            return None
        mine = shard(len(batch.tokens_T), pg)
        given, noise = (
            {index: take(whole, mine) for index, whole in (by_layer or {}).items()}
            for by_layer in (batch.routes, batch.route_noise)
        )
        if term is not None:
            if batch.routes is not None:
                first = {i: batch.routes[i][:, : of_layer[0]] for i, of_layer in hops.items()}
                batch = replace(batch, routes=first)
            term = partial(_term_here, term, batch, mine)
        return cls(width, given, noise, record, forbidden, term, {} if repeated else None)

    def of_layer(self, index: int, recomputing: bool, metrics: Metrics) -> Choice:
        return Choice(self, index, recomputing, metrics)


@dataclass(frozen=True)
class Choice:
    """One layer's choice of experts; stands where megatron-core's router asks its RouterReplay."""

    asked: Routing
    index: int
    recomputing: bool
    metrics: Metrics

    def get_replay_topk(
        self,
        logits_tE: torch.Tensor,
        k: int,
        num_groups: int | None,
        group_topk: int | None,
        choose: Callable,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits, experts) chosen, [t, k] each, with gradients to the logits at given routes."""
        asked, index = self.asked, self.index
        best = partial(choose, num_groups=num_groups, group_topk=group_topk)
        if asked.taken is None:
            top_tk, experts_tk = self._chosen(logits_tE, k, best)
        else:  # both passes alike: they must save the same tensors
            if self.recomputing:
                experts_tk = asked.taken[index][:, :k].long()
            else:
                experts_tk = self._chosen(logits_tE.detach(), k, best)[1]
            top_tk = _Picked.apply(logits_tE, experts_tk)
        taken_tk, beyond = experts_tk.to(torch.int16), asked.width - k
        for store in self._stores:
            store[index] = F.pad(taken_tk, (0, beyond), value=NOT_HANDED) if beyond else taken_tk
        term = None if asked.term is None else asked.term(logits_tE, index, self.metrics)
        if term is not None:
            self.metrics.loss_term("moe/router_loss", term)
            # Hangs the term's gradient on what follows. A repeated pass hangs it on a graph that
            # is never differentiated, so it counts once.
            top_tk = MoEAuxLossAutoScaler.apply(top_tk, term)
        return top_tk, experts_tk

    def _chosen(
        self, logits_tE: torch.Tensor, k: int, best: Callable
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits, experts) [t, k] of a first pass."""
        asked, index, allowed_tE = self.asked, self.index, logits_tE
        if index in asked.forbidden:
            allowed_tE = logits_tE.masked_fill(asked.forbidden[index], -torch.inf)
        if index in asked.noise:
            experts_tk = (allowed_tE + asked.noise[index]).topk(k, dim=1).indices
            top_tk = allowed_tE.gather(1, experts_tk)
        else:
            top_tk, experts_tk = best(allowed_tE, k)
        if index in asked.given:
            given_tk = asked.given[index][:, :k].long()
            experts_tk = torch.where(given_tk >= 0, given_tk, experts_tk)
            top_tk = logits_tE.gather(1, experts_tk)
        return top_tk, experts_tk

    @property
    def _stores(self) -> list[Routes]:
        """Where this pass writes its routes."""
        both = self.asked.record, self.asked.taken
        return [] if self.recomputing else [store for store in both if store is not None]

    def given_second(self, first: int) -> torch.Tensor | None:
        """int64 [t, k - first]: the routes given for the second hop, in a repetition those of the
        first pass; None if there are none."""
        taken = self.asked.taken if self.recomputing else None
        given = (self.asked.given if taken is None else taken).get(self.index)
        return None if given is None else given[:, first:].long()

    def record_second(self, first: int, experts_tk: torch.Tensor) -> None:
        """Records the second hop's experts, `NOT_HANDED` where there is none, behind the first's
        that were recorded before."""
        for store in self._stores:
            store[self.index][:, first:] = experts_tk.to(torch.int16)

    @property
    def forbidden(self) -> torch.Tensor | None:
        """bool [E]: the experts that no hop may choose."""
        return self.asked.forbidden.get(self.index)


class _Picked(torch.autograd.Function):
    """The logits of experts that are chosen already, with topk's gradient and what it saves; gather
    would save all logits."""

    @staticmethod
    def forward(ctx, logits_tE: torch.Tensor, experts_tk: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(experts_tk)
        ctx.experts = logits_tE.shape[1]
        return logits_tE.gather(1, experts_tk)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_tk: torch.Tensor) -> tuple[torch.Tensor, None]:
        (experts_tk,) = ctx.saved_tensors
        return d_tk.new_zeros(len(d_tk), ctx.experts).scatter_(1, experts_tk, d_tk), None


def _term_here(
    term: RouterTerm,
    batch: Microbatch,
    positions: range,
    logits_tE: torch.Tensor,
    index: int,
    metrics: Metrics,
) -> torch.Tensor | None:
    return term(logits_tE, batch, index, positions, metrics)


def whole_routes(record: Routes, pg: ProcessGroupCollection) -> Routes:
    """Gathers a record of this rank's positions to int16 [T, k] of the whole stream, on every rank
    that holds the stage. Routes stay on the stages of their layers."""
    if not record:
        return {}
    stacked = gather_shards(torch.stack([record[index] for index in sorted(record)], 1), pg)
    return dict(zip(sorted(record), stacked.unbind(1), strict=True))

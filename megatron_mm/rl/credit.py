"""From rewards to what every sampled token and every labelled position is credited with.

Shapes: P groups of this replica, G completions of each, C rewards, N = P x G, T stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist

from megatron_mm.earl.alignment import Alignment
from megatron_mm.earl.router_reward import (
    drawn_weights,
    label_positions,
    router_reward,
    router_weights,
)
from megatron_mm.parallel.groups import Groups
from megatron_mm.rl.advantages import (
    Advantages,
    compute_advantages,
    is_whitened,
    returns_to_go,
    span_advantages,
    whiten,
    whitening_sums,
)
from megatron_mm.rl.kl import kl_divergence
from megatron_mm.rl.policy_batch import PolicyBatch
from megatron_mm.rl.policy_losses import loss_denominator
from megatron_mm.rl.rollout.collect import Collected, Collector
from megatron_mm.rl.rollout.metrics import Rollout
from megatron_mm.rl.settings import RLConfig


@dataclass(frozen=True)
class Credit:
    """
    Attributes:
        rl: with nothing left open (`resolve_algorithm`).
    """

    rl: RLConfig
    groups: Groups
    collector: Collector
    alignment: Alignment | None

    def assign(self, found: Collected, made: Sequence[Sequence[PolicyBatch]]) -> Rollout:
        """Fill in what each position of the microbatches of every step is credited with. Every
        rank of the job calls it."""
        rl, size = self.rl, self.rl.num_generations
        flat = [c for group in found.groups for c in group.completions]
        spans = [marks for group in found.groups for marks in group.spans]
        shape = (len(found.groups), size, len(self.collector.names))
        empty = torch.zeros(0, *shape[1:])
        rewards = torch.stack([g.rewards_GC for g in found.groups]) if flat else empty
        failed = torch.stack([g.failed_GC for g in found.groups]) if flat else empty.bool()
        names, weights = [*self.collector.names], [*self.collector.weights]
        hits = None
        if self.alignment is not None and self.alignment.found is not None:
            hits = self.alignment.sums(flat, spans, self.collector.layers, self.groups)
        if rl.router_reward_weight:
            earned = router_reward(hits["used"]).float().view(*shape[:2], 1)
            rewards, failed = _append(rewards, failed, earned)
            names.append("router")
            weights.append(rl.router_reward_weight)
        batches = list(chain.from_iterable(made))
        kl = self._kl(batches, flat) if rl.use_kl_in_reward else None
        per_token = kl is not None and rl.advantage_estimator == "reinforce_plus_plus"
        if kl is not None and not per_token:
            total = torch.tensor([float(values.sum()) for values in kl]).view(*shape[:2], 1)
            rewards, failed = _append(rewards, failed, total)
            names.append("kl")
            weights.append(-rl.beta)
        found_advantages = compute_advantages(
            rewards,
            failed,
            weights,
            rl.advantage_estimator,
            rl.multi_objective_aggregation,
            rl.reward_std_floor,
        )
        values = found_advantages.advantages_PG.flatten()
        tokens = [value.expand(len(c.tokens_G)) for value, c in zip(values, flat, strict=True)]
        if per_token:
            tokens = [returns_to_go(float(v), k, rl.beta) for v, k in zip(values, kl, strict=True)]
        tokens = self._whitened(tokens, found_advantages)
        labelled = [
            label_positions(len(c.tokens_G), marks) for c, marks in zip(flat, spans, strict=True)
        ]
        if rl.span_credit:
            tokens = self._credited(tokens, spans, size)
        self._fill(batches, tokens, labelled, found_advantages.kept_PG.flatten())
        for of_step in made:
            self._router_scale(of_step)
        return Rollout(found, names, rewards, failed, found_advantages, hits, flat, spans)

    def _kl(self, batches: Sequence[PolicyBatch], flat: Sequence) -> list[torch.Tensor]:
        """k1 (or as configured) of every token of every completion."""
        found: dict[int, torch.Tensor] = {}
        for batch in batches:
            kl_T = kl_divergence(batch.old_logprobs_T, batch.ref_logprobs_T, self.rl.kl_estimator)
            parts = kl_T[batch.sampled].split(batch.lengths_N.tolist())
            found |= dict(zip(batch.members, parts, strict=True))
        return [found[n] for n in range(len(flat))]

    def _whitened(self, tokens: list[torch.Tensor], found: Advantages) -> list[torch.Tensor]:
        if not is_whitened(self.rl.advantage_estimator):
            return tokens
        kept = found.kept_PG.flatten().tolist()
        mine = [t for t, keep in zip(tokens, kept, strict=True) if keep]
        sums = whitening_sums(torch.cat(mine) if mine else torch.zeros(0))
        groups = self.groups
        if not groups.is_reader:
            sums.zero_()
        dist.all_reduce(sums, group=groups.world)
        return [whiten(values, sums) for values in tokens]

    def _credited(
        self, tokens: list[torch.Tensor], spans: Sequence[Sequence], size: int
    ) -> list[torch.Tensor]:
        credited = []
        for first in range(0, len(tokens), size):
            group = slice(first, first + size)
            lengths = [len(values) for values in tokens[group]]
            extra = span_advantages(spans[group], lengths)
            credited += [
                values + self.rl.span_credit * own
                for values, own in zip(tokens[group], extra, strict=True)
            ]
        return credited

    def _fill(
        self,
        batches: Sequence[PolicyBatch],
        tokens: Sequence[torch.Tensor],
        labelled: Sequence[tuple[torch.Tensor, torch.Tensor]],
        kept: torch.Tensor,
    ) -> None:
        """Hand advantages and the router's targets to the positions of the microbatches."""
        for batch in batches:
            batch.advantages_T = batch.spread([tokens[n] for n in batch.members])
            out = torch.tensor([not kept[n] for n in batch.members], dtype=torch.bool)
            left_out_T = torch.cat((out, torch.zeros(1, dtype=torch.bool)))[batch.completion_T]
            if self.rl.router_loss_coeff:
                skills, rights = (
                    zip(*(labelled[n] for n in batch.members), strict=True)
                    if batch.members
                    else ((), ())
                )
                skill_T = torch.where(batch.completion_T >= 0, batch.spread(skills).long(), -1)
                batch.skill_T = skill_T.masked_fill(left_out_T, -1)
                clip = self.rl.router_loss_clip
                if self.rl.router_temperature:
                    # The last token of a prompt took its best experts.
                    firsts_N = batch.lengths_N.cumsum(0) - batch.lengths_N
                    batch.skill_T[batch.sampled[firsts_N]] = -1
                    batch.router_weight_T = drawn_weights(batch.advantages_T, clip)
                else:
                    correct_T = batch.spread(rights).bool()
                    batch.router_weight_T = router_weights(batch.advantages_T, correct_T, clip)
            batch.completion_T = batch.completion_T.masked_fill(left_out_T, -1)
            batch.lengths_N = batch.lengths_N.masked_fill(out, 0)

    def _router_scale(self, batches: Sequence[PolicyBatch]) -> None:
        """The router term is a mean over labelled positions and layers, but gradients will be
        divided by the policy loss's denominator."""
        if not self.rl.router_loss_coeff:
            return
        member_SLE = self.alignment.used.membership()
        layers_S = member_SLE.any(2).sum(1)  # layers in which a skill has experts
        totals = torch.zeros(2, dtype=torch.int64)
        groups = self.groups
        if groups.is_reader:
            for batch in batches:
                rl = self.rl
                totals[0] += loss_denominator(
                    rl.loss_agg_mode, batch.lengths_N, rl.max_completion_length
                )
                totals[1] += layers_S[batch.skill_T[batch.skill_T >= 0]].sum()
        dist.all_reduce(totals, group=groups.world)
        policy, router = totals.tolist()
        for batch in batches:
            batch.router_scale = self.rl.router_loss_coeff * policy / max(router, 1)


def _append(
    rewards: torch.Tensor, failed: torch.Tensor, more: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    nothing = torch.zeros_like(more, dtype=torch.bool)
    return torch.cat((rewards, more), 2), torch.cat((failed, nothing), 2)

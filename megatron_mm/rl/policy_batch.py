"""Policy batches: microbatches of completions with all that the objective needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_mm.earl.router_reward import label_positions
from megatron_mm.earl.router_term import (
    RouterTargets,
    TaughtBatch,
    drawn_weights,
    rewarded_weights,
    sum_counted,
)
from megatron_mm.rl.completion_batch import CompletionBatch
from megatron_mm.rl.credit import Credited, SumOverReaders
from megatron_mm.rl.logprobs import Logprobs
from megatron_mm.rl.policy_losses import (
    entropy_threshold,
    importance_weights,
    loss_counts,
    loss_denominator,
)
from megatron_mm.rl.settings import ResolvedRL

# Joins the values, fp32 [K], of all replicas; every rank of the job calls it.
ValuesOfReaders = Callable[[torch.Tensor], torch.Tensor]


@dataclass(kw_only=True)
class PolicyBatch(CompletionBatch, TaughtBatch):
    """A microbatch to train on. A completion that is left out of the loss has `completion_T` -1
    and length 0. Values of sampled tokens are fp32 [T], 0 elsewhere.

    Attributes:
        old_logprobs_T: None: they are those of the training pass itself.
        rollout_weights_T: `importance_weights`, where the settings ask for them.
        kl_weights_T: factors of beta, where the settings ask for them.
        learnt_T: bool, where the policy loss learns; None: everywhere.
        divisor: int64 scalar, this microbatch's part of the number that the policy loss is divided
            by (`loss_denominator`): tokens, completions, or whatever the aggregation counts.
    """

    advantages_T: torch.Tensor
    rollout_logprobs_T: torch.Tensor
    old_logprobs_T: torch.Tensor | None
    ref_logprobs_T: torch.Tensor | None
    rollout_weights_T: torch.Tensor | None
    kl_weights_T: torch.Tensor | None
    learnt_T: torch.Tensor | None
    divisor: torch.Tensor

    @property
    def loss_weight(self) -> torch.Tensor:
        """See `Microbatch.loss_weight`."""
        return self.divisor.to(self.loss_mask_T.dtype)


def policy_batches(
    batches: Sequence[CompletionBatch],
    logprobs: Sequence[Logprobs],
    credited: Credited,
    rl: ResolvedRL,
    member_SLE: torch.Tensor | None,
    sum_over_readers: SumOverReaders,
    values_of_readers: ValuesOfReaders,
) -> list[PolicyBatch]:
    """Makes the microbatches of one step. Every rank of the job calls it.

    Args:
        batches, logprobs: this replica's part of the step.
        member_SLE: the clusters that the routers learn; None without a router term.
    """
    if member_SLE is None:
        routers: list[RouterTargets | None] = [None] * len(batches)
    else:
        routers = [*_router_targets(batches, credited, rl, member_SLE, sum_over_readers)]
    threshold = None
    if rl.top_entropy_quantile < 1:
        mine = [
            entropies(known)[kept_completions(batch, credited)[1] >= 0]
            for batch, known in zip(batches, logprobs, strict=True)
        ]
        entropies_K = values_of_readers(torch.cat([torch.zeros(0), *mine]))
        threshold = entropy_threshold(entropies_K, rl.top_entropy_quantile)
    return [
        policy_batch(batch, known, credited, rl, router, threshold)
        for batch, known, router in zip(batches, logprobs, routers, strict=True)
    ]


def entropies(logprobs: Logprobs) -> torch.Tensor:
    """Returns the entropies, fp32 [T], that `top_entropy_quantile` has had measured."""
    assert logprobs.entropy_T is not None
    return logprobs.entropy_T


def kept_completions(
    batch: CompletionBatch, credited: Credited
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns bool [N], which completions are left out of the loss, and the batch's `completion_T`
    without them."""
    kept_N = credited.kept_N
    out_N = torch.tensor([not kept_N[n] for n in batch.members], dtype=torch.bool)
    # Position -1 takes the last entry: no token was sampled there.
    left_out_T = torch.cat((out_N, torch.zeros(1, dtype=torch.bool)))[batch.completion_T]
    return out_N, batch.completion_T.masked_fill(left_out_T, -1)


def policy_batch(
    batch: CompletionBatch,
    logprobs: Logprobs,
    credited: Credited,
    rl: ResolvedRL,
    router: RouterTargets | None,
    threshold: torch.Tensor | None,
) -> PolicyBatch:
    """Makes one microbatch to train on. Nothing else makes a `PolicyBatch`.

    Args:
        threshold: the entropy that tokens reach which the policy loss learns; None: all.
    """
    out_N, completion_T = kept_completions(batch, credited)
    weights_T = None
    if rl.rollout_is:
        weights_T = importance_weights(
            logprobs.old_T, logprobs.rollout_T, batch.completion_T, len(batch.members), rl
        )
    lengths_N = batch.lengths_N.masked_fill(out_N, 0)
    counts_N = loss_counts(rl.loss_agg_mode, lengths_N, rl.max_completion_length)
    values = vars(batch) | {
        "completion_T": completion_T,
        "lengths_N": lengths_N,
        "position_weight_T": batch.position_weights(counts_N),
        "skill_T": _skills(batch, credited) if rl.earl.skill_map else None,
        "routes": batch.routes if logprobs.routes is None else logprobs.routes,
    }
    return PolicyBatch(
        **values,
        advantages_T=batch.spread([credited.token_advantages[n] for n in batch.members]),
        rollout_logprobs_T=logprobs.rollout_T,
        old_logprobs_T=logprobs.old_T,
        ref_logprobs_T=logprobs.ref_T,
        rollout_weights_T=weights_T,
        kl_weights_T=_kl_weights(batch, credited) if rl.beta else None,
        learnt_T=None if threshold is None else entropies(logprobs).double() >= threshold,
        divisor=counts_N.sum(),
        router=router,
    )


def _kl_weights(batch: CompletionBatch, credited: Credited) -> torch.Tensor | None:
    factors_N, tokens_N = credited.kl_factors_N, credited.token_advantages
    if factors_N is None:
        return None
    return batch.spread([factors_N[n].expand(len(tokens_N[n])) for n in batch.members])


def _skills(batch: CompletionBatch, credited: Credited) -> torch.Tensor:
    """Skills of all positions, int64 [T], -1 outside every span of a completion."""
    spans_N, tokens_N = credited.scored.spans_N, credited.token_advantages
    labelled = [label_positions(len(tokens_N[n]), spans_N[n])[0] for n in batch.members]
    return batch.spread(labelled, -1, torch.int64)


def _router_targets(
    batches: Sequence[CompletionBatch],
    credited: Credited,
    rl: ResolvedRL,
    member_SLE: torch.Tensor,
    sum_over_readers: SumOverReaders,
) -> list[RouterTargets]:
    """Makes the router targets of a step's microbatches. The router term is a weighted mean over
    positions and layers, but gradients will be divided by the policy loss's denominator. The scale
    makes up for that; it needs both sums over the whole step."""
    kept_N, spans_N = credited.kept_N, credited.scored.spans_N
    members = [n for batch in batches for n in batch.members]
    if rl.earl.router_temperature:
        weights = {
            n: drawn_weights(
                spans_N[n],
                credited.token_advantages[n],
                kept=kept_N[n],
                clip=rl.earl.router_loss_clip,
            )
            for n in members
        }
    else:
        rewards_N = credited.task_rewards_PG.flatten().tolist()
        lengths_N = [len(tokens) for tokens in credited.token_advantages]
        counted_N = [r if kept else math.nan for r, kept in zip(rewards_N, kept_N, strict=True)]
        weights = {n: rewarded_weights(lengths_N[n], spans_N[n], counted_N[n]) for n in members}
    lengths = [len(credited.token_advantages[n]) for n in members if kept_N[n]]
    divisor = loss_denominator(
        rl.loss_agg_mode, torch.tensor(lengths, dtype=torch.int64), rl.max_completion_length
    )
    sums = torch.tensor(
        [float(divisor), sum_counted(weights.values(), member_SLE)], dtype=torch.float64
    )
    divisor, counted = sum_over_readers(sums).tolist()
    scale = rl.earl.router_loss_coeff * divisor / counted if counted else 0.0
    return [
        RouterTargets(
            batch.spread([weights[n].weight_G for n in batch.members]),
            member_SLE,
            scale,
            rl.earl.router_temperature,
        )
        for batch in batches
    ]

"""Policy batches: microbatches of completions with all that the objective needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_mm.earl.router_term import (
    CompletionTargets,
    RouterTargets,
    completion_targets,
    count_taught,
)
from megatron_mm.rl.completion_batch import CompletionBatch
from megatron_mm.rl.credit import Credited, SumOverReaders
from megatron_mm.rl.logprobs import Logprobs
from megatron_mm.rl.policy_losses import loss_denominator, truncated_importance_weights
from megatron_mm.rl.settings import ResolvedRL


@dataclass(kw_only=True)
class PolicyBatch(CompletionBatch):
    """A microbatch to train on. A completion that is left out of the loss has `completion_T` -1
    and length 0. Values of sampled tokens are fp32 [T], 0 elsewhere.

    Attributes:
        old_logprobs_T: None: they are those of the training pass itself.
        rollout_weights_T: `truncated_importance_weights`, where the settings ask for them.
        router: what the routers learn; None without a router term.
    """

    advantages_T: torch.Tensor
    rollout_logprobs_T: torch.Tensor
    old_logprobs_T: torch.Tensor | None
    ref_logprobs_T: torch.Tensor | None
    rollout_weights_T: torch.Tensor | None
    router: RouterTargets | None

    def to(self, device: torch.device | str) -> PolicyBatch:
        moved = super().to(device)
        return moved if self.router is None else replace(moved, router=self.router.to(device))


def policy_batches(
    batches: Sequence[CompletionBatch],
    logprobs: Sequence[Logprobs],
    credited: Credited,
    rl: ResolvedRL,
    member_SLE: torch.Tensor | None,
    sum_over_readers: SumOverReaders,
) -> list[PolicyBatch]:
    """Makes the microbatches of one step.

    Args:
        batches, logprobs: this replica's part of the step.
        member_SLE: the clusters that the routers learn; None without a router term.
    """
    if member_SLE is None:
        routers: list[RouterTargets | None] = [None] * len(batches)
    else:
        routers = [*_router_targets(batches, credited, rl, member_SLE, sum_over_readers)]
    return [
        policy_batch(batch, known, credited, rl, router)
        for batch, known, router in zip(batches, logprobs, routers, strict=True)
    ]


def policy_batch(
    batch: CompletionBatch,
    logprobs: Logprobs,
    credited: Credited,
    rl: ResolvedRL,
    router: RouterTargets | None,
) -> PolicyBatch:
    """Makes one microbatch to train on. Nothing else makes a `PolicyBatch`."""
    kept_N = credited.kept_N
    out_N = torch.tensor([not kept_N[n] for n in batch.members], dtype=torch.bool)
    # Position -1 takes the last entry: no token was sampled there.
    left_out_T = torch.cat((out_N, torch.zeros(1, dtype=torch.bool)))[batch.completion_T]
    weights_T = None
    if rl.rollout_is:
        weights_T = truncated_importance_weights(
            logprobs.old_T,
            logprobs.rollout_T,
            batch.completion_T,
            len(batch.members),
            rl.rollout_is,
            rl.rollout_is_threshold,
        )
    values = vars(batch) | {
        "completion_T": batch.completion_T.masked_fill(left_out_T, -1),
        "lengths_N": batch.lengths_N.masked_fill(out_N, 0),
        "routes": batch.routes if logprobs.routes is None else logprobs.routes,
    }
    return PolicyBatch(
        **values,
        advantages_T=batch.spread([credited.token_advantages[n] for n in batch.members]),
        rollout_logprobs_T=logprobs.rollout_T,
        old_logprobs_T=logprobs.old_T,
        ref_logprobs_T=logprobs.ref_T,
        rollout_weights_T=weights_T,
        router=router,
    )


def _router_targets(
    batches: Sequence[CompletionBatch],
    credited: Credited,
    rl: ResolvedRL,
    member_SLE: torch.Tensor,
    sum_over_readers: SumOverReaders,
) -> list[RouterTargets]:
    """Makes the router targets of a step's microbatches. The router term is a mean over taught
    positions and layers, but gradients will be divided by the policy loss's denominator. The scale
    makes up for that; it needs both counts of the whole step."""
    kept_N, spans_N = credited.kept_N, credited.scored.spans_N
    members = [n for batch in batches for n in batch.members]
    taught: dict[int, CompletionTargets] = {
        n: completion_targets(
            spans_N[n],
            credited.token_advantages[n],
            kept=kept_N[n],
            clip=rl.earl.router_loss_clip,
            drawn=rl.earl.router_temperature > 0,
        )
        for n in members
    }
    lengths = [len(credited.token_advantages[n]) for n in members if kept_N[n]]
    divisor = loss_denominator(
        rl.loss_agg_mode, torch.tensor(lengths, dtype=torch.int64), rl.max_completion_length
    )
    counts = torch.tensor([int(divisor), count_taught(taught.values(), member_SLE)])
    divisor, positions = sum_over_readers(counts).tolist()
    temperature = rl.earl.router_temperature
    scale = rl.earl.router_loss_coeff * divisor / max(positions, 1)
    targets = []
    for batch in batches:
        mine = [taught[n] for n in batch.members]
        skill_T = batch.spread([skill_G for skill_G, _ in mine], -1, torch.int64)
        weight_T = batch.spread([weight_G for _, weight_G in mine])
        targets.append(RouterTargets(skill_T, weight_T, member_SLE, scale, temperature))
    return targets

"""The credit of every sampled token, from rewards. No process group is used here: the one sum over
ranks is a function that the caller hands in.

Shapes: P groups of this replica, G completions of each or tokens of one, C rewards, N = P x G.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_mm.earl.alignment import Hits
from megatron_mm.earl.router_reward import router_reward
from megatron_mm.earl.spans import Span
from megatron_mm.rl.advantages import (
    Advantages,
    clip_sigma,
    compute_advantages,
    has_kl_to_go,
    is_batch_scaled,
    is_whitened,
    returns_to_go,
    scale,
    span_advantages,
    standardise,
    weighted,
    whiten,
    whitening_sums,
    without_rewards,
)
from megatron_mm.rl.completion_batch import CompletionBatch, per_completion
from megatron_mm.rl.logprobs import Logprobs
from megatron_mm.rl.policy_losses import kl_divergence
from megatron_mm.rl.rollout.score import Scored
from megatron_mm.rl.settings import ResolvedRL, difficulty_name
from megatron_mm.rl.weightings import Factors, Judged, Weighting

# Sums a tensor over the readers of all replicas; every rank of the job calls it.
SumOverReaders = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Credited:
    """A scored rollout with the advantage of every sampled token.

    Attributes:
        names: of all rewards: the functions', then "router" and "kl" where they are rewards.
        rewards_PGC, failed_PGC: of all rewards.
        task_rewards_PG: weighted sums of the reward functions alone; NaN where a completion is left
            out.
        advantages: of each completion.
        token_advantages: fp32 [G] of each of the N completions.
        hits: how often labelled tokens met their experts; None without a skill map.
        cut_N: whether each completion is left out because it reached the length limit.
        kl_factors_N: of beta, fp32; None without `advantage_weighting`.
    """

    scored: Scored
    names: tuple[str, ...]
    rewards_PGC: torch.Tensor
    failed_PGC: torch.Tensor
    task_rewards_PG: torch.Tensor
    advantages: Advantages
    token_advantages: tuple[torch.Tensor, ...]
    hits: Hits | None
    cut_N: tuple[bool, ...]
    kl_factors_N: torch.Tensor | None

    @property
    def kept_N(self) -> list[bool]:
        """Whether each completion takes part in the loss: no reward of weight failed, one applies
        (or there are teachers), and it was not cut off where such completions are left out."""
        kept_N = self.advantages.kept_PG.flatten().tolist()
        return [kept and not cut for kept, cut in zip(kept_N, self.cut_N, strict=True)]


def credit(
    scored: Scored,
    weights: Sequence[float],
    rl: ResolvedRL,
    hits: Hits | None,
    kl: Sequence[torch.Tensor] | None,
    sum_over_readers: SumOverReaders,
    taught: Sequence[torch.Tensor] | None = None,
    weigh: Weighting | None = None,
) -> Credited:
    """Turns rewards into advantages.

    Args:
        weights: of the reward functions.
        kl: [G] of each completion, where the KL divergence is a part of the reward.
        taught: [G] of each completion, `teacher_gaps`, where there are teachers.
        weigh: of `advantage_weighting`; every rank of the job calls it.
    """
    lengths = [len(completion.tokens_G) for completion in scored.completions]
    to_go = kl if kl is not None and has_kl_to_go(rl.advantage_estimator) else None
    more: dict[str, tuple[float, torch.Tensor]] = {}  # name -> weight, [N]
    if rl.earl.router_reward_weight:
        assert hits is not None  # the weight is rejected without a skill map
        more["router"] = rl.earl.router_reward_weight, router_reward(hits.used).float()
    if kl is not None and to_go is None:
        cost_N = torch.tensor([float(values_G.sum()) for values_G in kl])
        more["kl"] = -rl.beta, _of_judged(cost_N, scored, weights, more)
    rewards_PGC, failed_PGC = _with(scored.rewards_PGC, scored.failed_PGC, more)
    if rewards_PGC.shape[2]:
        advantages = compute_advantages(
            rewards_PGC,
            failed_PGC,
            [*weights, *(weight for weight, _ in more.values())],
            rl.advantage_estimator,
            rl.multi_objective_aggregation,
            rl.reward_std_floor,
        )
    else:
        advantages = without_rewards(*rewards_PGC.shape[:2])
    kl_factors_N = None
    if weigh is not None:
        judged = judge(scored, rl, advantages)
        factors = weigh(judged)
        kl_factors_N = torch.as_tensor(factors.kl_PG).flatten()
        advantages = weighted_by(advantages, factors, judged)
    advantages = over_the_batch(advantages, rl, sum_over_readers)
    values = advantages.advantages_PG.flatten()
    tokens = [value.expand(length) for value, length in zip(values, lengths, strict=True)]
    if to_go is not None:
        tokens = [
            returns_to_go(float(value), kl_G, rl.beta)
            for value, kl_G in zip(values, to_go, strict=True)
        ]
    if is_whitened(rl.advantage_estimator):
        kept = [t for t, k in zip(tokens, advantages.kept_PG.flatten(), strict=True) if k]
        sums = sum_over_readers(whitening_sums(torch.cat([torch.zeros(0), *kept])))
        tokens = [whiten(values_G, sums) for values_G in tokens]
    if rl.earl.span_credit:
        tokens = with_span_credit(tokens, scored.spans, rl.earl.span_credit)
    if taught is not None:
        # A completion to which no reward applies still has a teacher; one of a failed reward is
        # left out.
        judged_N = advantages.kept_PG.flatten().tolist()
        tokens = [
            (t if judged else torch.zeros_like(t)) + rl.teacher_kl_coef * gap
            for t, judged, gap in zip(tokens, judged_N, taught, strict=True)
        ]
        failed_PG = (scored.failed_PGC & (torch.tensor([*weights]) != 0)).any(2)
        advantages = replace(advantages, kept_PG=~failed_PG)
    _, task_rewards_PG = weighted(scored.rewards_PGC, scored.failed_PGC, torch.tensor([*weights]))
    return Credited(
        scored,
        (*scored.names, *more),
        rewards_PGC,
        failed_PGC,
        task_rewards_PG,
        advantages,
        tuple(tokens),
        hits,
        tuple(rl.mask_truncated_completions and not c.finished for c in scored.completions),
        kl_factors_N,
    )


def judge(scored: Scored, rl: ResolvedRL, advantages: Advantages) -> Judged:
    """Returns the replica's groups as weightings see them."""
    c = scored.names.index(difficulty_name(rl))
    values_PG = scored.rewards_PGC[..., c].masked_fill(scored.failed_PGC[..., c], torch.nan)
    lengths = [len(completion.tokens_G) for completion in scored.completions]
    return Judged(
        advantages.rewards_PG,
        values_PG,
        values_PG >= rl.difficulty_threshold,  # NaN is not
        torch.tensor(lengths, dtype=torch.int64).view(values_PG.shape),
        advantages.advantages_PG,
    )


def weighted_by(advantages: Advantages, factors: Factors, judged: Judged) -> Advantages:
    """Returns the advantages times their factors, with metrics of both factors and of p."""
    kept_PG, rates_P = advantages.kept_PG, judged.pass_rate_P1.squeeze(1)
    sums = {
        "weighting/pass_rate": torch.stack((rates_P.nansum(), (~rates_P.isnan()).sum().double()))
    }
    for name, factor in (("advantage", factors.advantages_PG), ("kl", factors.kl_PG)):
        total = torch.as_tensor(factor)[kept_PG].double().sum()
        sums[f"weighting/{name}"] = torch.stack((total, kept_PG.sum().double()))
    return replace(
        advantages,
        advantages_PG=advantages.advantages_PG * factors.advantages_PG,
        sums=advantages.sums | sums,
    )


def over_the_batch(
    advantages: Advantages, rl: ResolvedRL, sum_over_readers: SumOverReaders
) -> Advantages:
    """Takes the steps that need all completions of the job: the batch's scale, GDPO's last
    normalisation, StableReinforce's filter. Every rank of the job calls it.

    Returns:
        the same with other advantages, and with the metric of those that were filtered.
    """
    found_PG, kept_PG = advantages.advantages_PG, advantages.kept_PG
    if is_batch_scaled(rl.advantage_estimator):
        sums = sum_over_readers(whitening_sums(advantages.rewards_PG[kept_PG]))
        found_PG = scale(found_PG, sums)
    several = rl.multi_objective_aggregation == "normalize_then_sum"
    if several or rl.advantage_clip_sigma:
        sums = sum_over_readers(whitening_sums(found_PG[kept_PG]))
        found_PG = standardise(found_PG, sums)
    metrics = dict(advantages.sums)
    if rl.advantage_clip_sigma:
        clipped_PG = clip_sigma(found_PG, rl.advantage_clip_sigma)
        gone = (clipped_PG != found_PG).sum()
        metrics["frac_advantage_clipped"] = torch.stack((gone.double(), kept_PG.sum().double()))
        found_PG = clipped_PG
    found_PG = found_PG.masked_fill(~kept_PG, 0.0)
    return replace(advantages, advantages_PG=found_PG, sums=metrics)


def with_span_credit(
    tokens: Sequence[torch.Tensor], spans: Sequence[Sequence[Sequence[Span]]], coefficient: float
) -> list[torch.Tensor]:
    """Returns the tokens' advantages plus `coefficient` times what their own span earned
    (`span_advantages`), group by group.

    Args:
        tokens: [G] of each completion; spans: [P][G].
    """
    credited: list[torch.Tensor] = []
    for of_group in spans:
        mine = tokens[len(credited) : len(credited) + len(of_group)]
        extra = span_advantages(of_group, [len(values_G) for values_G in mine])
        credited += [
            values_G + coefficient * own_G for values_G, own_G in zip(mine, extra, strict=True)
        ]
    return credited


def completion_kl(
    batches: Sequence[CompletionBatch], logprobs: Sequence[Logprobs], estimator: str
) -> list[torch.Tensor]:
    """Returns the KL divergence from the reference model at every token, [G] of each of the
    replica's completions, in their order."""
    values = [kl_divergence(known.old_T, known.ref_T, estimator) for known in logprobs]
    return per_completion(batches, values)


def teacher_gaps(
    batches: Sequence[CompletionBatch], logprobs: Sequence[Logprobs]
) -> list[torch.Tensor]:
    """Returns log p_teacher - log p_policy of every token before the first update, [G] of each of
    the replica's completions, in their order. As an advantage it descends the reverse divergence
    KL(policy || teacher) of the next token, at prefixes that the policy wrote (MiMo-V2-Flash, arXiv
    2601.02780, eq. 8; Nemotron-Cascade 2, arXiv 2603.19220, eq. 3)."""
    return per_completion(batches, [_gap(known) for known in logprobs])


def teacher_sums(
    batches: Sequence[CompletionBatch], logprobs: Sequence[Logprobs]
) -> dict[str, list[float]]:
    """Returns [numerator, denominator] of `teacher/kl`, the mean of log p_policy - log p_teacher
    over sampled tokens, and of `teacher/kl/<name>`."""
    sums: dict[str, list[float]] = {}
    for batch, known in zip(batches, logprobs, strict=True):
        gap = -float(_gap(known).double().sum())
        for name in ("teacher/kl", f"teacher/kl/{batch.teacher}"):
            total, count = sums.get(name, [0.0, 0.0])
            sums[name] = [total + gap, count + len(batch.sampled)]
    return sums


def _gap(known: Logprobs) -> torch.Tensor:
    assert known.teacher_T is not None and known.old_T is not None  # measured where there are any
    return known.teacher_T - known.old_T


def _of_judged(
    cost_N: torch.Tensor,
    scored: Scored,
    weights: Sequence[float],
    more: Mapping[str, tuple[float, torch.Tensor]],
) -> torch.Tensor:
    """Returns a cost of all completions, NaN where no other reward of weight applies: alone it
    would be their whole reward."""
    every = [*weights, *(weight for weight, _ in more.values())]
    if not any(every):
        return cost_N
    _, total_PG = weighted(*_with(scored.rewards_PGC, scored.failed_PGC, more), torch.tensor(every))
    return cost_N.masked_fill(total_PG.isnan().flatten(), torch.nan)


def _with(
    rewards_PGC: torch.Tensor,
    failed_PGC: torch.Tensor,
    more: Mapping[str, tuple[float, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Appends rewards that cannot fail."""
    shape = (*rewards_PGC.shape[:2], 1)
    columns = [values_N.view(shape) for _, values_N in more.values()]
    nothing = torch.zeros(*shape[:2], len(more), dtype=torch.bool)
    return torch.cat((rewards_PGC, *columns), 2), torch.cat((failed_PGC, nothing), 2)

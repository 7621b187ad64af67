"""Advantages from rewards, group by group.

Shapes: P prompts (groups), G completions of each, C reward components, K tokens. A reward that is
NaN is left out: no statistic includes it, its advantage is 0, and a metric counts it. A group whose
rewards are all equal has advantages of exactly 0, however its mean is rounded.

Standard deviations divide by n - 1, and `EPSILON` is added to them, as in TRL and verl.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_mm.errors import RLError
from megatron_mm.model.running_sum import running_sum
from megatron_mm.rl.algorithms import ESTIMATORS

EPSILON = 1e-4


@dataclass
class Advantages:
    advantages_PG: torch.Tensor
    rewards_PG: torch.Tensor  # weighted sum of the components; NaN where left out
    kept_PG: torch.Tensor  # bool: takes part in the loss
    # Metric: [numerator, denominator], to be summed over ranks.
    sums: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Whitened:
    """Marks an estimator whose advantages are normalised over all tokens afterwards (`whiten`).

    Attributes:
        kl_to_go: whether a KL divergence in the reward is subtracted at each token, from there to
            the end (`returns_to_go`), instead of from the completion's reward.
    """

    estimate: Callable[[torch.Tensor, float], torch.Tensor]
    kl_to_go: bool = False

    def __call__(self, rewards_PG: torch.Tensor, std_floor: float = 0.0) -> torch.Tensor:
        return self.estimate(rewards_PG, std_floor)


@dataclass(frozen=True)
class BatchScaled:
    """Marks an estimator whose advantages are divided by the standard deviation of the rewards of
    all completions afterwards (`scale`)."""

    estimate: Callable[[torch.Tensor, float], torch.Tensor]

    def __call__(self, rewards_PG: torch.Tensor, std_floor: float = 0.0) -> torch.Tensor:
        return self.estimate(rewards_PG, std_floor)


def grpo(rewards_PG: torch.Tensor, std_floor: float = 0.0) -> torch.Tensor:
    """(r - mean) / std over the group: GRPO, arXiv 2402.03300, section 4.1.2.

    A standard deviation below `std_floor` counts as the floor, so that a tiny spread stays small.
    """
    mean_P1, std_P1 = _moments(rewards_PG)
    centred_PG = rewards_PG - mean_P1
    return _zero_where_idle(rewards_PG, centred_PG / (std_P1.clamp(min=std_floor) + EPSILON))


def dr_grpo(rewards_PG: torch.Tensor, std_floor: float = 0.0) -> torch.Tensor:
    """r - mean over the group: Dr. GRPO, arXiv 2503.20783."""
    del std_floor
    return _zero_where_idle(rewards_PG, rewards_PG - _moments(rewards_PG)[0])


def rloo(rewards_PG: torch.Tensor, std_floor: float = 0.0) -> torch.Tensor:
    """r - mean of the group's others: RLOO, arXiv 2402.14740. That is
    n / (n - 1) * (r - mean) of n valid rewards."""
    del std_floor
    count_P1 = _valid(rewards_PG).sum(1, keepdim=True)
    centred_PG = rewards_PG - _moments(rewards_PG)[0]
    return _zero_where_idle(rewards_PG, centred_PG * count_P1 / (count_P1 - 1).clamp(min=1))


def _reward(rewards_PG: torch.Tensor, std_floor: float = 0.0) -> torch.Tensor:
    del std_floor
    return rewards_PG.masked_fill(rewards_PG.isnan(), 0.0)


# r - mean over the group, divided by the standard deviation of all rewards (TRL's scale_rewards
# "batch"; Lite PPO, arXiv 2508.08221, section 4.1.3).
grpo_batch = BatchScaled(dr_grpo)
# The reward itself, whitened over the tokens of all completions that are kept: REINFORCE++, arXiv
# 2501.03262.
reinforce_plus_plus = Whitened(_reward, kl_to_go=True)
# r - mean over the group, whitened: REINFORCE++ with a baseline, arXiv 2501.03262.
reinforce_plus_plus_baseline = Whitened(dr_grpo)


def is_whitened(estimator: str) -> bool:
    """Whether the advantages of a registered estimator or dotted path need `whiten`."""
    return isinstance(ESTIMATORS[estimator], Whitened)


def is_batch_scaled(estimator: str) -> bool:
    """Whether the advantages of a registered estimator or dotted path need `scale`."""
    return isinstance(ESTIMATORS[estimator], BatchScaled)


def has_kl_to_go(estimator: str) -> bool:
    """Whether a registered estimator or dotted path wants `returns_to_go`."""
    found = ESTIMATORS[estimator]
    return isinstance(found, Whitened) and found.kl_to_go


def compute_advantages(
    rewards_PGC: torch.Tensor,
    failed_PGC: torch.Tensor,
    weights: Sequence[float],
    estimator: str,
    aggregation: str = "sum_then_normalize",
    std_floor: float = 0.0,
) -> Advantages:
    """Combines several rewards into one advantage for each completion.

    Args:
        rewards_PGC: NaN where a reward does not apply to the completion (TRL's None).
        failed_PGC: bool, True where a reward applies but could not be computed. Such a completion
            is left out of everything, unless the weight of the reward is 0.
        weights: one for each of the C rewards.
        estimator: a name of ESTIMATORS or a dotted path; see `is_whitened`.
        aggregation: sum_then_normalize gives the estimator the weighted sum of the rewards;
            normalize_then_sum gives it each reward alone, and sums the weighted advantages, which
            then need `standardise`.
        std_floor: lower bound of a group's standard deviation.
    Raises:
        RLError: if the numbers of weights and rewards differ.
    """
    if len(weights) != rewards_PGC.shape[2]:
        raise RLError(
            f"{len(weights)} reward_weights but {rewards_PGC.shape[2]} rewards; give one for each"
        )
    weights_C = torch.tensor(weights, dtype=rewards_PGC.dtype, device=rewards_PGC.device)
    rewards_PGC, total_PG = weighted(rewards_PGC, failed_PGC, weights_C)
    kept_PG = _valid(total_PG)
    estimate = ESTIMATORS[estimator]
    if aggregation == "sum_then_normalize":
        advantages_PG = estimate(total_PG, std_floor)
    else:
        each = [estimate(rewards_PGC[..., c], std_floor) for c in range(len(weights))]
        advantages_PG = torch.stack(each, 2) @ weights_C
    return Advantages(advantages_PG, total_PG, kept_PG, _group_sums(total_PG, kept_PG))


def without_rewards(groups: int, size: int) -> Advantages:
    """Returns advantages of 0 for completions that nothing scores."""
    nothing_PG = torch.zeros(groups, size)
    return Advantages(nothing_PG, nothing_PG, torch.ones_like(nothing_PG, dtype=torch.bool), {})


def weighted(
    rewards_PGC: torch.Tensor, failed_PGC: torch.Tensor, weights_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the rewards that count, [P, G, C], and their weighted sum, [P, G]. NaN marks what is
    left out: a completion to which no reward of weight applies, or of which one failed, is left out
    of every component too."""
    counts_C = weights_C != 0
    usable_PGC = _valid(rewards_PGC) & ~failed_PGC & counts_C
    kept_PG = usable_PGC.any(2) & ~(failed_PGC & counts_C).any(2)
    rewards_PGC = rewards_PGC.masked_fill(~(usable_PGC & kept_PG.unsqueeze(2)), torch.nan)
    total_PG = (rewards_PGC * weights_C).nansum(2).masked_fill(~kept_PG, torch.nan)
    return rewards_PGC, total_PG


def component_sums(
    rewards_PGC: torch.Tensor, failed_PGC: torch.Tensor, names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Returns [numerator, denominator] of `rewards/<name>/mean` over the completions that each
    reward could judge, and of `rewards/<name>/frac_failed` over all completions."""
    sums = {}
    for c, name in enumerate(names):
        valid_PG = _valid(rewards_PGC[..., c]) & ~failed_PGC[..., c]
        total = torch.where(valid_PG, rewards_PGC[..., c], 0.0).double().sum()
        failed = failed_PGC[..., c].double()
        sums[f"rewards/{name}/mean"] = torch.stack((total, valid_PG.double().sum()))
        sums[f"rewards/{name}/frac_failed"] = torch.stack(
            (failed.sum(), torch.ones_like(failed).sum())
        )
    return sums


def keep_groups(metric_PG: torch.Tensor) -> torch.Tensor:
    """Returns bool [P]: the groups to train on under DAPO's dynamic sampling, arXiv 2503.14476,
    eq. 11: those whose completions differ in `metric` (accuracy or reward), NaN left out."""
    return ~_idle(metric_PG)


def returns_to_go(reward: float, kl_T: torch.Tensor, beta: float) -> torch.Tensor:
    """Returns [T]: REINFORCE++'s advantage of each token of one completion before whitening,
    A_t = r - beta * sum of the KL from t to the end (arXiv 2501.03262)."""
    return reward - beta * running_sum(kl_T.flip(0)).flip(0)


def span_advantages(
    spans: Sequence[Sequence[tuple[int, int, int, bool]]], lengths: Sequence[int]
) -> list[torch.Tensor]:
    """Returns span-level credit within one group, [G] of each completion: a token of a labelled
    span has 1 if its own answer is right, else 0, minus the mean over all labelled tokens of the
    group; other tokens have 0.

    Args:
        spans: of each completion, a list of (first token, end, skill, right or not).
        lengths: tokens of each completion.
    """
    marks = [torch.full((length,), torch.nan) for length in lengths]
    for mark, of_one in zip(marks, spans, strict=True):
        for start, stop, _, correct in of_one:
            mark[start:stop] = float(correct)
    mean = torch.cat(marks).nanmean() if marks else torch.nan
    return [torch.nan_to_num(mark - mean, nan=0.0) for mark in marks]


def whitening_sums(values_K: torch.Tensor) -> torch.Tensor:
    """Returns fp64 [3]: count, sum and sum of squares, to be summed over ranks and given to
    `whiten`."""
    values_K = values_K.double()
    return torch.stack((values_K.new_tensor(len(values_K)), values_K.sum(), (values_K**2).sum()))


def scale(advantages_PG: torch.Tensor, sums_3: torch.Tensor) -> torch.Tensor:
    """Returns A / std of the rewards of all completions.

    Args:
        sums_3: `whitening_sums` of the rewards that are no NaN.
    """
    return (advantages_PG.double() / (_batch(sums_3)[1] + EPSILON)).to(advantages_PG.dtype)


def standardise(advantages_PG: torch.Tensor, sums_3: torch.Tensor) -> torch.Tensor:
    """Returns (A - mean) / std over all completions, but 0 in groups where all A are 0: those have
    nothing to learn from. GDPO's last step (arXiv 2601.05242, eq. 6; TRL's `normalize_then_sum`).

    Args:
        sums_3: `whitening_sums` of the advantages of completions that are kept.
    """
    mean, std = _batch(sums_3)
    found_PG = ((advantages_PG.double() - mean) / (std + EPSILON)).to(advantages_PG.dtype)
    return found_PG.masked_fill((advantages_PG == 0).all(1, keepdim=True), 0.0)


def clip_sigma(advantages_PG: torch.Tensor, sigma: float) -> torch.Tensor:
    """Sets standardised advantages beyond `sigma` to 0: StableReinforce's advantage filter, arXiv
    2505.02835, eq. 4."""
    return advantages_PG.masked_fill(advantages_PG.abs() > sigma, 0.0)


def whiten(values_K: torch.Tensor, sums_3: torch.Tensor) -> torch.Tensor:
    """Returns (A - mean) / std over the tokens of the whole batch, REINFORCE++'s normalisation."""
    mean, std = _batch(sums_3)
    return ((values_K.double() - mean) / (std + EPSILON)).to(values_K.dtype)


def _batch(sums_3: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and standard deviation, fp64, of what `whitening_sums` summed."""
    count, total, squares = sums_3.double().unbind()
    mean = total / count.clamp(min=1)
    variance = (squares - count * mean**2).clamp(min=0) / (count - 1).clamp(min=1)
    return mean, variance.sqrt()


def _valid(rewards: torch.Tensor) -> torch.Tensor:
    return ~rewards.isnan()


def _idle(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Returns bool [P]: groups with fewer than two valid rewards, or whose rewards are all
    equal."""
    highest_P = rewards_PG.masked_fill(rewards_PG.isnan(), -torch.inf).amax(1)
    lowest_P = rewards_PG.masked_fill(rewards_PG.isnan(), torch.inf).amin(1)
    return (highest_P <= lowest_P) | (_valid(rewards_PG).sum(1) < 2)


def _moments(rewards_PG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and standard deviation of the valid rewards, each [P, 1]."""
    count_P1 = _valid(rewards_PG).sum(1, keepdim=True)
    mean_P1 = rewards_PG.nansum(1, keepdim=True) / count_P1.clamp(min=1)
    squares_P1 = (rewards_PG - mean_P1).square().nansum(1, keepdim=True)
    return mean_P1, (squares_P1 / (count_P1 - 1).clamp(min=1)).sqrt()


def _zero_where_idle(rewards_PG: torch.Tensor, advantages_PG: torch.Tensor) -> torch.Tensor:
    out = _idle(rewards_PG).unsqueeze(1) | rewards_PG.isnan()
    return advantages_PG.masked_fill(out, 0.0)


def _group_sums(total_PG: torch.Tensor, kept_PG: torch.Tensor) -> dict[str, torch.Tensor]:
    """Metrics under TRL's names. A group without a kept completion is not counted."""
    mean_P1, std_P1 = _moments(total_PG)
    alive_P = kept_PG.any(1)
    groups, samples = alive_P.sum(), kept_PG.sum()
    pairs = {
        "reward": (total_PG.nansum(), samples),
        "reward_std": (std_P1.squeeze(1)[alive_P].sum(), groups),
        "frac_reward_zero_std": ((_idle(total_PG) & alive_P).sum(), groups),
        "frac_reward_failed": ((~kept_PG).sum(), kept_PG.new_tensor(kept_PG.numel(), dtype=int)),
    }
    return {name: torch.stack((n.double(), d.double())) for name, (n, d) in pairs.items()}

"""Parts of reinforcement learning as a user would write them."""

from __future__ import annotations

import torch

from megatron_mm.rl import advantages, policy_losses
from megatron_mm.rl.algorithms import ALGORITHMS
from megatron_mm.rl.weightings import Factors


def estimator(rewards_PG, std_floor=0.0):
    return advantages.grpo(rewards_PG, std_floor)


def loss(tokens, rl):
    return policy_losses.clip(tokens, rl)


def double_k3(logprobs_K, ref_logprobs_K):
    return 2 * policy_losses.k3(logprobs_K, ref_logprobs_K)


COMPLETIONS = policy_losses.LossAggregation(True, lambda lengths_N, longest: (lengths_N > 0).sum())

MINE = dict(ALGORITHMS["grpo"]) | {
    "advantage_estimator": "support.own_rl.estimator",
    "policy_loss": "support.own_rl.loss",
    "loss_agg_mode": "support.own_rl.COMPLETIONS",
}
INCOMPLETE = {"policy_loss": "clip"}
MISSPELT = MINE | {"epsilom": 0.1}


def even(prompts, completions, completion_ids, log_metric, **columns):
    """`support.even.even`, which also says how many tokens it saw."""
    for ids in completion_ids:
        log_metric("rollout/tokens_seen", len(ids))
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def ones(judged):
    """A weighting that changes nothing."""
    return Factors(torch.ones(judged.rewards_PG.shape))


def longest_alone(judged, factor=2.0):
    """A weighting of completions: twice the advantage for the longest of a group."""
    longest_PG = judged.lengths_PG == judged.lengths_PG.amax(1, keepdim=True)
    return Factors(torch.where(longest_PG, factor, 1.0))


def fails_on_one_replica(judged):
    if judged.rewards_PG.shape[1] > 2 and torch.distributed.get_rank() == 1:
        raise KeyError("no such weight")
    return Factors()


def not_finite(judged):
    return Factors(torch.full(judged.rewards_PG.shape, torch.inf))


def of_another_shape(judged):
    return Factors(torch.ones(len(judged.rewards_PG)))

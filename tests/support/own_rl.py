"""Parts of reinforcement learning as a user would write them."""

from __future__ import annotations

from megatron_mm.rl import advantages, policy_losses
from megatron_mm.rl.algorithms import ALGORITHMS


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

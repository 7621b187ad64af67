"""The settings of reinforcement learning, a part of `schema.py`'s tree."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Algorithm = Literal[
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "sapo",
    "cispo",
    "rloo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
]
AdvantageEstimator = Literal[
    "grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"
]
PolicyLoss = Literal["clip", "gspo", "sapo", "cispo", "reinforce"]
LossAggMode = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
]


@dataclass
class RLConfig:
    """Reinforcement learning with group rewards; names are TRL's, or verl's where TRL has none.

    `algorithm` names a published one. It fills in every setting of the second block that is
    left at none (`config/algorithms.py`), so each can also be changed by itself.
    """

    algorithm: Algorithm = "grpo"
    num_generations: int = 8  # completions of each prompt, a group
    # Prompts whose completions are generated together. global_batch_size counts completions of
    # one optimizer step; default: as many prompts as one step has.
    rollout_batch_size: int | None = None
    num_iterations: int = 1  # optimizer steps that see each completion
    max_completion_length: int = 256  # tokens
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    max_num_seqs: int = 64  # completions that a replica generates at the same time
    # The trainer uses the experts of its own first pass (R2) or of the rollout (R3).
    routing_replay: Literal["none", "R2", "R3"] = "none"
    rl_moe_aux_loss_coeff: float = 0.0  # takes the place of moe_aux_loss_coeff

    advantage_estimator: AdvantageEstimator | None = None
    policy_loss: PolicyLoss | None = None
    loss_agg_mode: LossAggMode | None = None
    epsilon: float | None = None  # the ratio is held above 1 - epsilon
    epsilon_high: float | None = None  # and below 1 + epsilon_high
    filter_groups: bool | None = None  # sample again for groups whose rewards are all equal
    max_generation_rounds: int = 10  # of doing so, for one rollout
    delta: float | None = None  # dual clip: bound of the ratio where the advantage is negative
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05

    beta: float = 0.0  # of the KL divergence from the reference model; 0: none is kept
    ref_load: str | None = None  # the reference model's checkpoint
    # In the loss k1 is of no use: the expectation of its gradient is zero.
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    use_kl_in_reward: bool = False
    # Truncated importance sampling where rollout and trainer disagree on probabilities.
    rollout_is: Literal["token", "sequence"] | None = None
    rollout_is_threshold: float = 2.0

    # Built-in names or dotted paths, with options: exact, numeric(tolerance=0.1), my.module.reward
    reward_funcs: list[str] = field(default_factory=list)
    reward_weights: list[float] = field(default_factory=list)  # default: 1 each
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = (
        "sum_then_normalize"
    )
    reward_std_floor: float = 0.0  # a group's standard deviation counts as no less
    reward_num_workers: int = 2  # processes
    reward_timeout: float = 10.0  # seconds for each call of a reward function
    reward_batch_size: int = 1  # completions in a call; a call that fails costs all of them

    skill_map: str | None = None  # which experts serve which skill; JSON
    skill_map_shuffle_seed: int | None = None  # the control: experts change places at random
    span_labels: str = "clauses"  # clauses, whole or a dotted path: tokens to skills
    on_missing_cluster: Literal["error", "skip"] = "error"  # a skill that the map does not have
    router_reward_weight: float = 0.0  # of the hit share beyond chance, as a reward
    router_loss_coeff: float = 0.0  # of the router term
    router_loss_clip: float = 2.0  # the advantage counts as no more in the router term
    # Above 0, experts of completions are drawn (Gumbel top-k of the logits over it), and the router
    # term is about those drawn: the advantage counts as no less than -router_loss_clip either, and
    # the gradient is some moe_router_topk / router_temperature times as strong.
    router_temperature: float = 0.0
    span_credit: float = 0.0  # of a span's own answer, for the advantage of its tokens

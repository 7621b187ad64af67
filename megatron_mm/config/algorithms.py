"""What the published algorithms are made of, and which RL settings make no sense."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from megatron_mm.config.settings import RunConfig
from megatron_mm.config.settings_rl import RLConfig
from megatron_mm.errors import ConfigError

_CLIP = {"policy_loss": "clip", "epsilon": 0.2, "epsilon_high": 0.2, "filter_groups": False}

# Each algorithm as its paper has it; RLConfig's fields that are none take these values.
ALGORITHMS: dict[str, dict[str, Any]] = {
    # arXiv 2402.03300, eq. 3
    "grpo": _CLIP | {"advantage_estimator": "grpo", "loss_agg_mode": "seq-mean-token-mean"},
    # arXiv 2503.20783: no division by the standard deviation nor by a completion's own length
    "dr_grpo": _CLIP
    | {"advantage_estimator": "dr_grpo", "loss_agg_mode": "seq-mean-token-sum-norm"},
    # arXiv 2503.14476, eq. 8 and section 4.1; its overlong punishment is a reward
    "dapo": {
        "advantage_estimator": "grpo",
        "policy_loss": "clip",
        "loss_agg_mode": "token-mean",
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "filter_groups": True,
    },
    # arXiv 2507.18071, eq. 5 and section 5.1
    "gspo": {
        "advantage_estimator": "grpo",
        "policy_loss": "gspo",
        "loss_agg_mode": "seq-mean-token-mean",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
        "filter_groups": False,
    },
    # arXiv 2511.20347, eq. 5; there is no clipping
    "sapo": _CLIP
    | {
        "advantage_estimator": "grpo",
        "policy_loss": "sapo",
        "loss_agg_mode": "seq-mean-token-mean",
    },
    # arXiv 2506.13585, eq. 4: no lower bound; it gives no upper one, this is TRL's cap of 5
    "cispo": {
        "advantage_estimator": "grpo",
        "policy_loss": "cispo",
        "loss_agg_mode": "token-mean",
        "epsilon": 1.0,
        "epsilon_high": 4.0,
        "filter_groups": False,
    },
    # arXiv 2402.14740
    "rloo": _CLIP
    | {
        "advantage_estimator": "rloo",
        "policy_loss": "reinforce",
        "loss_agg_mode": "seq-mean-token-sum",
    },
    # arXiv 2501.03262
    "reinforce_plus_plus": _CLIP
    | {"advantage_estimator": "reinforce_plus_plus", "loss_agg_mode": "token-mean"},
    "reinforce_plus_plus_baseline": _CLIP
    | {"advantage_estimator": "reinforce_plus_plus_baseline", "loss_agg_mode": "token-mean"},
}


def resolve_algorithm(rl: RLConfig) -> RLConfig:
    """`rl` with what it leaves at none filled in from its algorithm."""
    given = ALGORITHMS[rl.algorithm]
    return replace(rl, **{k: v for k, v in given.items() if getattr(rl, k) is None})


class RolloutPlan(NamedTuple):
    """How rollouts and optimizer steps go together."""

    prompts: int  # of a rollout, on all replicas together
    prompts_per_step: int
    steps: int  # of a rollout, over all its num_iterations passes


def rollout_plan(run: RunConfig) -> RolloutPlan:
    rl = run.rl
    per_step = run.training.global_batch_size // rl.num_generations
    prompts = rl.rollout_batch_size or per_step
    return RolloutPlan(prompts, per_step, prompts // per_step * rl.num_iterations)


def check_rl(run: RunConfig) -> None:
    """Raises ConfigError for RL settings that do not fit each other. Signs are checked already."""
    if run.training.objective == "sft":
        default = RLConfig()
        for key, value in vars(run.rl).items():
            off = getattr(default, key)
            _require(value == off, key, value, f"{off!r} with objective sft, which does no RL")
        return
    rl = resolve_algorithm(run.rl)
    _require(rl.num_generations > 1, "num_generations", rl.num_generations, "2 or more, a group")
    _require(rl.epsilon <= 1, "epsilon", rl.epsilon, "above 0 to 1; 1 is no lower bound")
    least = 1 + rl.epsilon_high
    allowed = f"none, or more than 1 + epsilon_high = {least:g}"
    _require(rl.delta is None or rl.delta > least, "delta", rl.delta, allowed)
    allowed = "none, or this value with policy_loss clip or gspo"
    _require(rl.delta is None or rl.policy_loss in ("clip", "gspo"), "delta", rl.delta, allowed)
    functions, weights = len(rl.reward_funcs), len(rl.reward_weights)
    allowed = f"none, or one for each of the {functions} reward_funcs"
    _require(weights in (0, functions), "reward_weights", rl.reward_weights, allowed)
    _require(
        all(abs(w) < float("inf") for w in rl.reward_weights),
        "reward_weights",
        rl.reward_weights,
        "finite numbers",
    )
    _check_rollouts(run)
    # Dynamic sampling compares the functions' rewards; the router's is known too late for it.
    allowed = "false, or true with reward_funcs"
    _require(functions > 0 or not rl.filter_groups, "filter_groups", rl.filter_groups, allowed)
    rewarded = functions + (rl.router_reward_weight > 0)
    _require(rewarded > 0, "reward_funcs", rl.reward_funcs, "at least 1 reward")
    _require(
        rl.beta > 0 or not rl.use_kl_in_reward,
        "use_kl_in_reward",
        rl.use_kl_in_reward,
        "false, or true with beta above 0",
    )
    for key in ("router_reward_weight", "router_loss_coeff", "skill_map_shuffle_seed"):
        value = getattr(rl, key)
        allowed = "left out, or this value with skill_map"
        _require(value in (0, None) or bool(rl.skill_map), key, value, allowed)
    drawn = rl.router_temperature
    allowed = "0, or this value with routing_replay R3, which trains through the drawn experts"
    _require(not drawn or rl.routing_replay == "R3", "router_temperature", drawn, allowed)
    steps = rollout_plan(run).steps
    allowed = (
        f"0, or this value where a rollout serves one step, not {steps}: see router_loss_coeff"
    )
    late = rl.router_loss_coeff > 0 and steps > 1  # REINFORCE, without a ratio to the draw
    _require(not (drawn and late), "router_temperature", drawn, allowed)


def _check_rollouts(run: RunConfig) -> None:
    rl, training, data = run.rl, run.training, run.data
    group, batch = rl.num_generations, training.global_batch_size
    allowed = f"one that divides global_batch_size = {batch}, which counts completions"
    _require(batch % group == 0, "num_generations", group, allowed)
    prompts = rl.rollout_batch_size or batch // group
    allowed = f"a multiple of global_batch_size / num_generations = {batch // group} prompts"
    _require(prompts * group % batch == 0, "rollout_batch_size", rl.rollout_batch_size, allowed)
    steps = rollout_plan(run).steps
    for key, value in (
        ("train_iters", training.train_iters),
        ("save_interval", run.checkpoint.save_interval or 0),
        ("eval_interval", run.evaluation.eval_interval or 0),
    ):
        if value % steps:  # a rollout is used up before anything is saved
            raise ConfigError(f"{key} is {value}; allowed: a multiple of a rollout's {steps} steps")
    if rl.max_completion_length >= data.seq_length:
        raise ConfigError(
            f"rl.max_completion_length is {rl.max_completion_length}; allowed: less than "
            f"seq_length = {data.seq_length}, which prompt and completion share"
        )
    for key, value in (("packing", data.packing), ("num_workers", data.num_workers)):
        if value:
            raise ConfigError(f"{key} is {value!r}; allowed: {type(value)()!r} with objective grpo")
    _require(rl.top_p <= 1, "top_p", rl.top_p, "above 0 to 1")
    needed = "the reference model's checkpoint with beta above 0, none with beta 0"
    _require((rl.beta > 0) == bool(rl.ref_load), "ref_load", rl.ref_load, needed)


def _require(condition: bool, key: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"rl.{key} is {value!r}; allowed: {allowed}")

"""What the published algorithms are made of, and which RL settings make no sense."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_mm.config.errors import ConfigError
from megatron_mm.config.schema import RLConfig, RunConfig

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
    rewarded = functions + (rl.router_reward_weight > 0)
    _require(rewarded > 0, "reward_funcs", rl.reward_funcs, "at least 1 reward")
    _require(
        rl.beta > 0 or not rl.use_kl_in_reward,
        "use_kl_in_reward",
        rl.use_kl_in_reward,
        "false, or true with beta above 0",
    )
    for key in ("router_reward_weight", "router_loss_coeff"):
        value = getattr(rl, key)
        _require(value == 0 or bool(rl.skill_map), key, value, "0, or this value with skill_map")


def _require(condition: bool, key: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"rl.{key} is {value!r}; allowed: {allowed}")

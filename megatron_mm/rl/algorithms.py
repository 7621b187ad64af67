"""The published algorithms, and the registries of their parts. Torch-free: parts are imported when
they are used.

An algorithm of one's own is one value and one registration, or a dotted path:

    ALGORITHMS.register("mine", ALGORITHMS["grpo"] | {"policy_loss": "my.losses.mine"})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_mm.plugins import Registry

_ADVANTAGES, _LOSSES = "megatron_mm.rl.advantages", "megatron_mm.rl.policy_losses"

# (rewards [P, G], std_floor) -> advantages [P, G]
ESTIMATORS: Registry[Callable[..., Any]] = Registry(
    "advantage estimator",
    {
        name: f"{_ADVANTAGES}.{name}"
        for name in (
            "grpo",
            "grpo_batch",
            "dr_grpo",
            "rloo",
            "reinforce_plus_plus",
            "reinforce_plus_plus_baseline",
        )
    },
    kind="function",
)
# (tokens, rl) -> TokenLoss
POLICY_LOSSES: Registry[Callable[..., Any]] = Registry(
    "policy loss",
    {name: f"{_LOSSES}.{name}" for name in ("clip", "gspo", "sapo", "cispo", "reinforce")},
    kind="function",
)
LOSS_AGGREGATIONS: Registry[Any] = Registry(
    "loss aggregation",
    {
        "token-mean": f"{_LOSSES}.TOKEN_MEAN",
        "seq-mean-token-mean": f"{_LOSSES}.SEQ_MEAN_TOKEN_MEAN",
        "seq-mean-token-sum": f"{_LOSSES}.SEQ_MEAN_TOKEN_SUM",
        "seq-mean-token-sum-norm": f"{_LOSSES}.SEQ_MEAN_TOKEN_SUM_NORM",
    },
    kind="LossAggregation",
    needs=("per_token", "denominator"),
)
# (judged groups, options) -> Factors; any of them may be combined
WEIGHTINGS: Registry[Callable[..., Any]] = Registry(
    "advantage weighting",
    {
        name: f"megatron_mm.rl.weightings.{name}"
        for name in ("observe_r1", "odsw", "stcr", "dads", "univg")
    },
    kind="function",
)
# (log-probabilities [K], those of the reference [K]) -> KL divergence [K]
KL_ESTIMATORS: Registry[Callable[..., Any]] = Registry(
    "KL estimator",
    {name: f"{_LOSSES}.{name}" for name in ("k1", "k2", "k3")},
    kind="function",
)

_CLIP = {"policy_loss": "clip", "epsilon": 0.2, "epsilon_high": 0.2, "filter_groups": False}

# Each algorithm as its paper has it: values of the fields of RLConfig that are none.
ALGORITHMS: Registry[Mapping[str, Any]] = Registry(
    "algorithm",
    {
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
    },
    kind="mapping",
    needs=("items",),
)

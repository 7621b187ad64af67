"""Algorithms, estimators, losses and numbers of a reward that nobody registered."""

from __future__ import annotations

import pytest

from megatron_mm.config import ConfigError, RunConfig, validate
from megatron_mm.rl.settings import RLConfig
from support.grpo_runs import grpo_run, on_rank_steps
from support.trainers import LAYOUTS

OWN = "support.own_rl"


@pytest.mark.parametrize("layout", ["one rank", "DP2"])
def test_an_algorithm_by_dotted_path_and_a_number_that_a_reward_adds(ranks, scenes, layout):
    size, sizes = LAYOUTS[layout]
    own = grpo_run(scenes, algorithm=f"{OWN}.MINE", reward_funcs=[f"{OWN}.even"], **sizes)
    found = ranks(size, on_rank_steps, own, 2)
    expected = ranks(size, on_rank_steps, grpo_run(scenes, **sizes), 2)
    for one, other in zip(found, expected, strict=True):
        begun = one[0]
        seen = begun.pop("rollout/tokens_seen")
        assert seen == pytest.approx(begun["completions/mean_length"], rel=1e-12)
        # The same mathematics, so the same steps bitwise.
        assert [{k: v for k, v in step.items() if k != "table"} for step in one] == [
            {k: v for k, v in step.items() if k != "table"} for step in other
        ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"algorithm": "grpoo"}, "unknown algorithm grpoo; did you mean grpo"),
        ({"algorithm": f"{OWN}.INCOMPLETE"}, f"algorithm {OWN}.INCOMPLETE has no `epsilon`; it ne"),
        ({"algorithm": f"{OWN}.MISSPELT"}, f"key in algorithm {OWN}.MISSPELT: epsilom; did you"),
        ({"algorithm": f"{OWN}.even"}, f"algorithm {OWN}.even has no `items`"),
        ({"policy_loss": "clipp"}, "unknown policy loss clipp; did you mean clip or cispo?"),
        ({"advantage_estimator": "gae"}, "unknown advantage estimator gae; allowed: dr_grpo, grpo"),
        ({"loss_agg_mode": f"{OWN}.loss"}, f"loss aggregation {OWN}.loss has no `per_token`"),
        ({"kl_estimator": "k4"}, "unknown KL estimator k4; allowed: k1, k2, k3"),
        ({"kl_estimator": f"{OWN}.missing"}, f"KL estimator {OWN}.missing cannot be imported"),
    ],
)
def test_a_part_that_cannot_be_used_is_one_line(setting, message):
    run = RunConfig()
    run.training.objective, run.training.global_batch_size = "grpo", 8
    run.objectives["rl"] = RLConfig(**{"reward_funcs": ["exact"]} | setting)
    with pytest.raises(ConfigError) as caught:
        validate(run)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_own_parts_beside_a_published_algorithm():
    run = RunConfig()
    run.training.objective, run.training.global_batch_size = "grpo", 8
    run.objectives["rl"] = RLConfig(
        reward_funcs=["exact"], policy_loss=f"{OWN}.loss", kl_estimator=f"{OWN}.double_k3"
    )
    validate(run)

"""Reinforcement learning in the loop: the same steps on every layout, replayed routes, resuming.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

import pytest

from megatron_mm.config import RunConfig
from megatron_mm.earl.skill_map import SkillMap, save_skill_map
from support.grpo_runs import TOKENS, grpo_run, on_rank_steps
from support.trainers import LAYOUTS, digits_run

SKILLS = ("transcribe", "ocr", "count", "spatial", "arithmetic", "multihop")


def assert_same_steps(one: list[dict], other: list[dict], bound: float) -> None:
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        assert a.keys() == b.keys()
        for name in a.keys() - {"table"}:
            if name == "train/train_rollout_logprob_abs_diff":
                assert max(a[name], b[name]) <= 1e-5
            # The one is a mean over replicas by definition, the other is of no use in RL.
            elif name not in ("rollout/moe/mutual_information", "moe/load_balancing_loss"):
                assert b[name] == pytest.approx(a[name], rel=bound, abs=bound), (step, name)


@pytest.fixture(scope="module")
def skill_map(tmp_path_factory) -> str:
    """A map of the runs' model: two layers, experts as in the tiny preset."""
    run = digits_run(tmp_path_factory.mktemp("none"))
    experts, k = run.model.language.num_experts, run.model.language.moe_router_topk
    skills = {
        skill: [[n % experts, (n + 1) % experts], [(2 * n) % experts]]
        for n, skill in enumerate(SKILLS)
    }
    path = tmp_path_factory.mktemp("map") / "map.json"
    save_skill_map(SkillMap(2, experts, k, skills), path)
    return str(path)


ARMS = {
    "grpo": {},
    "earl": dict(
        router_reward_weight=0.5,
        router_loss_coeff=0.3,
        span_labels="support.even.thirds",
        span_credit=0.1,
        routing_replay="R3",
        algorithm="dapo",
    ),
    # Experts are drawn too, and the routers learn from those drawn.
    "drawn": dict(
        router_reward_weight=0.5,
        router_loss_coeff=0.3,
        router_temperature=0.5,
        span_labels="support.even.thirds",
        routing_replay="R3",
        rollout_batch_size=4,
    ),
    # Some replicas keep no group of a round, and steps are made of what several rounds kept.
    "filtered": dict(
        algorithm="dapo",
        reward_funcs=["support.even.sometimes"],
        global_batch_size=8,
        rollout_batch_size=4,
    ),
}


def arm(scenes, skill_map, name: str, **settings) -> RunConfig:
    extra = {"skill_map": skill_map} if "router_loss_coeff" in ARMS[name] else {}
    return grpo_run(scenes, **(ARMS[name] | extra | settings))


@pytest.fixture(scope="module")
def one_rank(ranks, scenes, skill_map):
    return {name: ranks(1, on_rank_steps, arm(scenes, skill_map, name), 4)[0] for name in ARMS}


@pytest.mark.parametrize("name", ARMS)
def test_a_step_learns_from_what_was_sampled(one_rank, name):
    steps = one_rank[name]
    begins = [True] * 4 if name == "drawn" else [True, False, True, False]
    assert [bool(step["table"]) for step in steps] == begins
    for step in steps:
        assert (
            step["train/grad_norm"] > 1e-3 and step["train/train_rollout_logprob_abs_diff"] <= 1e-5
        )
    begun = steps[0]
    if name == "filtered":
        assert begun["rollout/rounds"] > 1 and begun["frac_reward_zero_std"] == 0
        assert begun["rollout/generated"] == 16 * begun["rollout/rounds"]
        return
    assert begun["reward_std"] > 0 and begun["completions/max_length"] == TOKENS
    prompts = 4 if name == "drawn" else 8
    assert begun["train/consumed_samples"] == prompts
    assert steps[2]["train/consumed_samples"] == prompts * sum(begins[:3])
    if name == "earl":
        assert begun["rewards/router/mean"] > 0
        assert 0 < begun["rollout/moe/hit_rate"] < 1 and "rollout/moe/hit_rate/ocr" in begun
        assert 0 < begun["rollout/moe/hit_rate_shuffled"] < 1
        assert begun["rollout/moe/max_violation"] > 0
    # The second step is off the policy that sampled: its ratios are no longer 1.
    assert begun["clip_ratio/region_mean"] == 0 and begun["entropy"] > 1


@pytest.mark.parametrize("name", ["earl", "drawn"])
def test_the_router_term_has_a_say(ranks, scenes, skill_map, one_rank, name):
    changed = [dict(router_loss_coeff=0.0), dict(router_loss_coeff=0.6)]
    without, double = (
        ranks(1, on_rank_steps, arm(scenes, skill_map, name, **settings), 1)[0][0]
        for settings in changed
    )
    with_it = one_rank[name][0]
    assert without["reward"] == with_it["reward"] and "moe/router_loss" not in without
    # Rounding is below 1e-6.
    assert abs(without["train/grad_norm"] / with_it["train/grad_norm"] - 1) > 1e-3
    assert double["moe/router_loss"] == pytest.approx(2 * with_it["moe/router_loss"], rel=1e-5)
    assert abs(with_it["moe/router_loss"]) > 1e-3


@pytest.mark.parametrize("layout", ["one rank", "TP2", "DP2", "EP2", "PP2xVPP2"])
def test_norms_of_routers_are_the_norm_if_only_they_learn(ranks, scenes, layout):
    size, sizes = LAYOUTS[layout]
    frozen = {f"freeze_{module}": True for module in ("language", "vision", "projector", "clvr")}
    for steps in ranks(size, on_rank_steps, grpo_run(scenes, **frozen, **sizes), 2):
        for step in steps:
            norms = {k: v for k, v in step.items() if k.startswith("moe/router_grad_norm/")}
            assert len(norms) == 2 and min(norms.values()) > 0
            whole = sum(v * v for v in norms.values()) ** 0.5
            # The whole norm is taken in fp32.
            assert whole == pytest.approx(step["train/grad_norm"], rel=1e-5)


OTHERS = [name for name in LAYOUTS if name != "one rank"]
CASES = [(name, layout) for name in ("grpo", "earl") for layout in OTHERS]
CASES += [("filtered", layout) for layout in ("PP2", "DP2", "EP2")]
CASES += [("drawn", layout) for layout in ("TP2", "PP2", "PP2xVPP2", "EP2", "CP2", "DP2")]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_steps_do_not_depend_on_the_layout(ranks, scenes, skill_map, one_rank, name, layout):
    """Rewards, losses and gradient norms of four steps, two from each of two rollouts. Adam divides
    gradients by their size, so their rounding grows to that of a step: hence a small one, lest a
    token of the second rollout flips, and the wider bound."""
    size, sizes = LAYOUTS[layout]
    for rank in ranks(size, on_rank_steps, arm(scenes, skill_map, name, **sizes), 4):
        assert_same_steps(one_rank[name], rank, 2e-3)
        assert_same_steps(one_rank[name][:1], rank[:1], 2e-5)

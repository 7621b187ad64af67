"""Reinforcement learning in the loop: the same steps on every layout, replayed routes, resuming.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

import json

import pytest

from megatron_mm.config.settings import MODULES, DataPhase
from support.collectives import on_rank_collectives
from support.grpo_runs import (
    ARMS,
    TOKENS,
    arm,
    assert_same_steps,
    grpo_run,
    on_rank_steps,
    trainer_of,
)
from support.trainers import LAYOUTS, PRIME, TP3


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
    frozen = {f"freeze_{module}": True for module in MODULES if module != "router"}
    for steps in ranks(size, on_rank_steps, grpo_run(scenes, **frozen, **sizes), 2):
        for step in steps:
            norms = {k: v for k, v in step.items() if k.startswith("moe/router_grad_norm/")}
            assert len(norms) == 2 and min(norms.values()) > 0
            whole = sum(v * v for v in norms.values()) ** 0.5
            # The whole norm is taken in fp32.
            assert whole == pytest.approx(step["train/grad_norm"], rel=1e-5)


OTHERS = [name for name in LAYOUTS if name != "one rank"]
CASES = [("earl", layout) for layout in OTHERS]
CASES += [("grpo", layout) for layout in ("EP2", "PP2xVPP2", "TP2xPP2", "PP2, encoder beside")]
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


@pytest.mark.parametrize("name", ["grpo", "earl"])
def test_steps_do_not_depend_on_the_padding_of_a_vocabulary(ranks, scenes, skill_map, name):
    """Rewards, entropies, log-probabilities, losses and gradient norms; 389 tokens on 3 ranks."""
    (expected,) = ranks(1, on_rank_steps, arm(scenes, skill_map, name, **PRIME), 2)
    for rank in ranks(3, on_rank_steps, arm(scenes, skill_map, name, **PRIME, **TP3), 2):
        assert_same_steps(expected[:1], rank[:1], 2e-5)  # as on the layouts above
        assert_same_steps(expected, rank, 2e-3)


@pytest.mark.parametrize("name", ["DP2", "PP2"])
def test_only_the_first_rollout_and_step_send_objects(ranks, scenes, tmp_path, name):
    """A rollout serves two steps. All rows have one skill: another's rewards would be new names."""
    lines = (scenes / "mix.jsonl").read_text().splitlines()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(x for x in lines if json.loads(x)["skill"] == "multihop"))
    (tmp_path / "images").symlink_to(scenes / "images")
    size, sizes = LAYOUTS[name]
    run = grpo_run(scenes, train_data=[DataPhase(str(rows))], **sizes)
    for steps in ranks(size, on_rank_collectives, run, 4, trainer_of):
        told = [{n: count for n, count in step.items() if n != "agreements"} for step in steps]
        # Names of metrics and kinds of rewards, and the columns of the rows.
        assert told == [{"all_gather_object": 3}, {}, {}, {}]

"""Weightings of advantages against the numbers of their papers and repositories, and in a run."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_mm.config import ConfigError, RunConfig, validate
from megatron_mm.errors import DataError, RLError
from megatron_mm.rl.settings import RLConfig
from megatron_mm.rl.weightings import Judged, weighting_of
from support.grpo_runs import assert_same_steps, grpo_run, on_rank_steps, trainer_of
from support.trainers import LAYOUTS

OWN = "support.own_rl"
G = 4
NAN = math.nan
RIGHT = [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]  # p = 0, 1/G, 1/2, 1
ROOT = math.sqrt(0.5)  # cos(pi (1/4 - 1/2))


def judged(difficulty, lengths=None, rewards=None) -> Judged:
    difficulty_PG = torch.tensor(difficulty, dtype=torch.float32)
    rewards_PG = difficulty_PG if rewards is None else torch.tensor(rewards)
    lengths_PG = torch.full(difficulty_PG.shape, 10) if lengths is None else torch.tensor(lengths)
    advantages_PG = rewards_PG - rewards_PG.nanmean(1, keepdim=True)
    return Judged(rewards_PG, difficulty_PG, difficulty_PG >= 0.5, lengths_PG, advantages_PG)


@pytest.mark.parametrize(
    ("entry", "at_p"),
    [
        ("observe_r1", [0, 1.35, 1.8, 0]),  # 4 sigma d (1 - d), sigma 1.8
        ("observe_r1(scale=1.0)", [0, 0.75, 1, 0]),
        ("odsw(stage='easy')", [0, ROOT, 1, 1]),
        ("odsw", [0, ROOT, 1, 0]),
        ("odsw(stage='medium')", [0, ROOT, 1, 0]),
        ("odsw(stage='hard')", [0.25, 1, 1, 0]),
        ("univg", [math.e, math.exp(0.75), math.exp(0.5), 1]),
        ("univg(form='power', power=2)", [1.05**2, 0.8**2, 0.55**2, 0.05**2]),
        ("univg(form='log')", [-math.log(m + 0.02) for m in (0, 0.25, 0.5, 1)]),
    ],
)
def test_the_published_table(entry, at_p):
    found = weighting_of([entry])(judged(RIGHT))
    # fp32 of numbers up to 4; the cosine of pi / 2 is 6e-17.
    expected = torch.tensor(at_p, dtype=torch.float32).unsqueeze(1).expand(4, G)
    torch.testing.assert_close(found.advantages_PG, expected, rtol=1e-6, atol=1e-7)
    assert (found.kl_PG == 1).all()


def test_the_kl_is_held_less_where_a_rare_answer_is_right():
    found = weighting_of(["dads"])(judged(RIGHT))
    at = [1 - math.exp(-math.e * p) for p in (0.25, 0.5)]
    expected = [[1.0] * 4, [at[0], 1, 1, 1], [at[1], at[1], 1, 1], [1.0] * 4]
    torch.testing.assert_close(found.kl_PG, torch.tensor(expected), rtol=1e-6, atol=0)
    assert (found.advantages_PG == 1).all()
    assert at == pytest.approx([0.4932, 0.7431], abs=1e-4)


def test_wrong_answers_that_are_longer_than_right_ones_weigh_more():
    lengths = [[9, 900, 1, 1], [100, 1100, 100, 99], [100, 300, 2200, 200], [1, 2, 3, 4]]
    found = weighting_of(["stcr"])(judged(RIGHT, lengths)).advantages_PG
    # 1,000 tokens over the mean of 100, and 2,000 over that of 200; none is right at p = 0.
    longer = [2 - 1.00001**-1000, 2 - 1.00001**-2000]
    expected = [[1.0] * 4, [1, longer[0], 1, 1], [1, 1, longer[1], 1], [1.0] * 4]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=0)
    assert longer[0] == pytest.approx(1.00995, abs=1e-5)


def test_p_is_of_the_difficulty_reward_and_of_those_it_judged():
    """A format reward in the total, a failure and a group without a verdict do not shift it."""
    given = judged(
        [[1, 0, NAN, NAN], [NAN] * 4], rewards=[[1.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.0]]
    )
    assert given.pass_rate_P1[0].tolist() == [0.5] and given.pass_rate_P1[1].isnan()
    found = weighting_of(["observe_r1", "univg"])(given)
    product = 1.8 * math.exp(0.5)
    expected = torch.tensor([[product] * 4, [1.0] * 4])
    torch.testing.assert_close(found.advantages_PG, expected, rtol=1e-6, atol=0)


def test_groups_are_weighed_alone():
    """However groups lie on replicas, their factors are the same bits."""
    values = torch.rand(12, G, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    lengths = torch.randint(1, 3000, (12, G), generator=torch.Generator().manual_seed(1))
    weigh = weighting_of(["observe_r1", "stcr", "dads", "univg", f"{OWN}.longest_alone"])
    whole = weigh(judged(values.tolist(), lengths.tolist()))
    for cut in ([5, 7], [1] * 12, [0, 12]):
        parts = [
            weigh(judged(v.view(-1, G).tolist(), n.view(-1, G).tolist()))
            for v, n in zip(values.split(cut), lengths.split(cut), strict=True)
            if len(v)
        ]
        assert torch.equal(torch.cat([part.advantages_PG for part in parts]), whole.advantages_PG)
        assert torch.equal(torch.cat([part.kl_PG for part in parts]), whole.kl_PG)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("odsw(stage='meduim')", "odsw: stage is 'meduim'; allowed: easy, medium, hard"),
        ("univg(form='cos')", "univg: form is 'cos'; allowed: exp, power, log"),
        ("stcr(basis=2)", "advantage weighting stcr: got an unexpected keyword argument 'basis'"),
        (f"{OWN}.not_finite", "4 of 4 factors are inf; give finite numbers"),
        (f"{OWN}.of_another_shape", "factors of the shape [2] for 2 groups of 2; give [groups, 1]"),
    ],
)
def test_a_weighting_that_cannot_be_used_is_one_line(entry, message):
    with pytest.raises(RLError) as caught:
        weighting_of([entry])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"advantage_weighting": ["odws"]}, "advantage weighting 'odws' is not built in; use one"),
        ({"advantage_weighting": ["odsw(1)"]}, "'odsw(1)' cannot be read; write name, name(key="),
        ({"advantage_weighting": [f"{OWN}.gone"]}, f"weighting {OWN}.gone cannot be imported"),
        (
            {"advantage_weighting": ["odsw"], "reward_funcs": ["exact", "tags"]},
            "rl.difficulty_reward is None; allowed: one of the 2 reward_funcs (exact, tags)",
        ),
        (
            {"difficulty_reward": "numeric"},
            "rl.difficulty_reward is 'numeric'; allowed: one of the 1 reward_funcs (exact)",
        ),
        ({"advantage_weighting": ["dads"]}, "without dads, or with beta above 0 and use_kl_in_rew"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(setting, message):
    run = RunConfig()
    run.training.objective, run.training.global_batch_size = "grpo", 8
    run.objectives["rl"] = RLConfig(**{"reward_funcs": ["exact"]} | setting)
    with pytest.raises(ConfigError) as caught:
        validate(run)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def plain(ranks, scenes):
    return ranks(1, on_rank_steps, grpo_run(scenes), 2)[0]


def without_weights(step: dict) -> dict:
    return {k: v for k, v in step.items() if not k.startswith("weighting/")}


@pytest.mark.parametrize("layout", ["one rank", "DP2"])
def test_factors_of_one_change_no_bit(ranks, scenes, plain, layout):
    size, sizes = LAYOUTS[layout]
    run = grpo_run(scenes, advantage_weighting=[f"{OWN}.ones"], **sizes)
    expected = plain if size == 1 else ranks(size, on_rank_steps, grpo_run(scenes, **sizes), 2)[0]
    found = ranks(size, on_rank_steps, run, 2)[0]
    assert [without_weights(step) for step in found] == [without_weights(s) for s in expected]
    assert found[0]["weighting/advantage"] == 1.0 and 0 < found[0]["weighting/pass_rate"] < 1


@pytest.mark.parametrize("layout", ["DP2", "PP2"])
def test_weighted_steps_do_not_depend_on_the_layout(ranks, scenes, plain, layout):
    settings = dict(advantage_weighting=["observe_r1", f"{OWN}.longest_alone(factor=3.0)"])
    (expected,) = ranks(1, on_rank_steps, grpo_run(scenes, **settings), 1)
    # Rounding is below 1e-6: the weights have a say.
    assert abs(expected[0]["train/grad_norm"] / plain[0]["train/grad_norm"] - 1) > 1e-3
    size, sizes = LAYOUTS[layout]
    for rank in ranks(size, on_rank_steps, grpo_run(scenes, **settings, **sizes), 1):
        assert_same_steps(expected, rank, 2e-5)


def on_rank_error(run: RunConfig) -> str:
    trainer = None
    try:
        trainer = trainer_of(run)
        trainer.step()
    except DataError as error:
        return str(error)
    finally:
        if trainer is not None:
            trainer.source.close()
    return "nothing"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (f"{OWN}.fails_on_one_replica", "fails_on_one_replica: KeyError: 'no such"),
        ("odsw(stage='none')", "odsw: stage is 'none'; allowed: easy, medium, hard"),
    ],
)
def test_what_fails_on_one_replica_fails_on_every_rank(ranks, scenes, entry, message):
    found = ranks(2, on_rank_error, grpo_run(scenes, advantage_weighting=[entry]))
    assert all(message in error and "\n" not in error for error in found), found

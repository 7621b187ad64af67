"""Preference pairs in the loop: the same losses and gradients on every layout and in any bins.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

import math

import pytest

from megatron_mm.preference.settings import DPOConfig
from support.invariance import BROKEN, worst
from support.pair_runs import (
    on_rank_balances,
    on_rank_gradients,
    on_rank_without_sums,
    pairs_run,
    write_pairs,
)
from support.trainers import CP2, LAYOUTS

START = {"sigmoid": math.log(2), "bco_pair": 2 * math.log(2), "apo_zero": 1.0, "ipo": 25.0}
LOSSES = dict(loss_type=[*START, "sft"], loss_weights=[0.5, 0.2, 1.0, 0.01, 1.0])
# fp32 sums in another order. The worst seen is 6e-6, in dt_bias under TP2; pipelines are bitwise
# equal. A lost sum gives more than BROKEN.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def rows(scenes, tmp_path_factory):
    return write_pairs(scenes, tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="module")
def one_rank(ranks, scenes, rows):
    return ranks(1, on_rank_gradients, pairs_run(scenes, rows, **LOSSES))[0]


def assert_start(step: dict) -> None:
    """Policy and reference agree to the bit, so what is left is the rounding of fp64."""
    for name, expected in START.items():
        assert step[f"train/{name}_loss"] == pytest.approx(expected, rel=1e-7), name
    assert abs(step["rewards/margins"]) <= 1e-9 and step["rewards/delta"] == 0


def assert_same(found, expected, tolerance: float = TOLERANCE) -> None:
    (steps, gradients), (expected_steps, expected_gradients) = found, expected
    for step, other in zip(steps, expected_steps, strict=True):
        assert step.keys() == other.keys()
        for name in step.keys() - {"moe/load_balancing_loss"}:
            assert step[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), name
    if len(gradients) > 1:  # whole on rank 0 alone
        error, parameter = worst(gradients, expected_gradients)
        assert error <= tolerance, f"{parameter}: {error:.1e}"
        assert gradients["replicas"] <= tolerance


def test_losses_begin_where_they_must(one_rank):
    (start, away), gradients = one_rank
    assert_start(start)
    assert start["train/pairs"] == 8 and start["train/consumed_samples"] == 8
    assert away["rewards/accuracies"] not in (0, 1) and abs(away["rewards/margins"]) > 1e-2
    assert start["moe/load_balancing_loss"] > 0 and len(gradients) > 50


@pytest.mark.parametrize("layout", ["TP2", "CP2", "PP2", "PP2xVPP2", "EP2", "PP2, encoder beside"])
def test_losses_and_gradients_do_not_depend_on_the_layout(ranks, scenes, rows, one_rank, layout):
    """With the balancing loss."""
    size, sizes = LAYOUTS[layout]
    for rank in ranks(size, on_rank_gradients, pairs_run(scenes, rows, **LOSSES, **sizes)):
        assert_start(rank[0][0])
        assert_same(rank, one_rank)


def test_they_do_not_depend_on_bins(ranks, scenes, rows):
    """One pair, four, or as many as tokens allow, on one rank and on two. The balancing loss is
    off: it is one of each microbatch."""
    common = LOSSES | dict(moe_aux_loss_coeff=0.0)
    expected = ranks(1, on_rank_gradients, pairs_run(scenes, rows, micro_batch_size=1, **common))[0]
    for size, settings in (
        (1, dict(micro_batch_size=4)),
        (1, dict(micro_batch_size=1, packing=True)),
        (2, dict(micro_batch_size=1, packing=True)),
    ):
        for rank in ranks(size, on_rank_gradients, pairs_run(scenes, rows, **common, **settings)):
            assert_same(rank, expected)


@pytest.mark.parametrize("layout", ["one rank", "TP2"])
def test_the_balancing_loss_is_weighed_like_the_main_loss(ranks, scenes, rows, layout):
    """In a step of one microbatch its gradient is the coefficient's, whatever the main loss is
    divided by: pairs here, tokens there. There are 10 tokens or more in a pair's answers."""
    size, sizes = LAYOUTS[layout]
    run = pairs_run(scenes, rows, micro_batch_size=8, moe_aux_loss_coeff=1.0, **sizes)
    run.objectives["dpo"] = DPOConfig(["hinge"], dpo_beta=1e-30)  # flat
    for pairs, tokens in ranks(size, on_rank_balances, run):
        assert pairs == pytest.approx(tokens, rel=1e-5) and pairs > 1e-3  # fp32 sums


def test_a_lost_sum_would_be_seen(ranks, scenes, rows, one_rank):
    """Slopes at what one context-parallel rank has of an answer are others."""
    found = ranks(2, on_rank_without_sums, pairs_run(scenes, rows, **LOSSES, **CP2))[0]
    assert worst(found[1], one_rank[1])[0] > BROKEN

"""Advantages against scalar references. A group of equal rewards has advantages of exactly zero,
and a failure never counts as a reward."""

import math
import statistics

import pytest
import torch

from megatron_mm.errors import RLError
from megatron_mm.rl.advantages import (
    EPSILON,
    ESTIMATORS,
    component_sums,
    compute_advantages,
    keep_groups,
    returns_to_go,
    whiten,
    whitening_sums,
)

NAN = math.nan


def reference(name, group, floor=0.0):
    """Returns the advantages of one group from the papers' equations; NaN is left out."""
    valid = [r for r in group if r == r]
    if len(valid) < 2 or len(set(valid)) == 1:
        constant = name == "reinforce_plus_plus"
        return [r if constant and r == r else 0.0 for r in group]
    mean, std = statistics.mean(valid), statistics.stdev(valid)
    out = []
    for i, r in enumerate(group):
        if r != r:
            out.append(0.0)
        elif name == "grpo":
            out.append((r - mean) / (max(std, floor) + EPSILON))
        elif name == "rloo":
            others = [o for j, o in enumerate(group) if j != i and o == o]
            out.append(r - statistics.mean(others))
        elif name == "reinforce_plus_plus":
            out.append(r)
        else:
            out.append(r - mean)
    return out


GROUPS = [
    [1.0, 0.0, 0.0, 1.0],
    [0.3, -2.0, 5.5, 0.25],
    [1.0, NAN, 0.5, 0.0],
    [NAN, 2.0, NAN, NAN],
    [NAN] * 4,
    [0.1] * 4,
]


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_estimators_equal_their_equations(name, floor):
    found = ESTIMATORS[name](torch.tensor(GROUPS, dtype=torch.float64), floor)
    expected = torch.tensor([reference(name, g, floor) for g in GROUPS], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(name, dtype):
    """A mean of equal numbers is often not that number: 0.1 * 3 / 3 is not 0.1."""
    rewards = torch.tensor([[r] * 7 for r in (0.1, 1 / 3, 0.7, -1e6, 1e-8)], dtype=dtype)
    assert torch.equal(ESTIMATORS[name](rewards, 0.0), torch.zeros_like(rewards))


def test_the_floor_keeps_a_tiny_spread_small():
    rewards = torch.tensor([[0.5, 0.5, 0.5, 0.501]])
    assert ESTIMATORS["grpo"](rewards, 0.0).abs().max() > 1
    assert ESTIMATORS["grpo"](rewards, 0.1).abs().max() < 0.01


def parts(rewards, failed=None):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    failed = torch.zeros(rewards.shape, dtype=torch.bool) if failed is None else failed
    return rewards, failed


def test_the_two_orders_of_combining():
    rewards, failed = parts([[[1.0, 10.0], [0.0, 30.0], [1.0, 20.0]]])
    first = compute_advantages(rewards, failed, [2.0, 0.5], "grpo")
    expected = reference("grpo", [7.0, 15.0, 12.0])
    torch.testing.assert_close(first.advantages_PG[0], torch.tensor(expected).double())
    second = compute_advantages(rewards, failed, [2.0, 0.5], "grpo", "normalize_then_sum")
    a, b = reference("grpo", [1.0, 0.0, 1.0]), reference("grpo", [10.0, 30.0, 20.0])
    expected = torch.tensor([2 * x + 0.5 * y for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(second.advantages_PG[0], expected.double())
    assert first.rewards_PG.tolist() == second.rewards_PG.tolist() == [[7.0, 15.0, 12.0]]


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_a_failure_costs_its_own_completion_only(aggregation):
    rewards, failed = parts([[[1.0, 3.0], [NAN, 9.0], [0.0, 1.0], [1.0, 2.0]]])
    failed[0, 1, 0] = True
    found = compute_advantages(rewards, failed, [1.0, 1.0], "grpo", aggregation)
    without = compute_advantages(
        rewards[:, [0, 2, 3]], failed[:, [0, 2, 3]], [1.0, 1.0], "grpo", aggregation
    )
    assert found.kept_PG.tolist() == [[True, False, True, True]]
    assert found.advantages_PG[0, 1] == 0
    assert torch.equal(found.advantages_PG[:, [0, 2, 3]], without.advantages_PG)
    assert found.sums["frac_reward_failed"].tolist() == [1, 4]
    assert found.sums["reward"].tolist() == [8.0, 3]


def test_a_reward_without_weight_changes_nothing_even_where_it_fails():
    rewards, failed = parts([[[1.0, NAN], [0.0, 5.0], [0.5, NAN]]])
    failed[0, 0, 1] = True
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        found = compute_advantages(rewards, failed, [1.0, 0.0], "grpo", aggregation)
        alone = compute_advantages(rewards[..., :1], failed[..., :1], [1.0], "grpo")
        assert torch.equal(found.advantages_PG, alone.advantages_PG) and found.kept_PG.all()


def test_a_reward_that_does_not_apply_is_no_failure():
    rewards, failed = parts([[[1.0, NAN], [0.0, NAN]], [[NAN, NAN], [NAN, NAN]]])
    found = compute_advantages(rewards, failed, [1.0, 1.0], "dr_grpo")
    assert found.advantages_PG.tolist() == [[0.5, -0.5], [0.0, 0.0]]
    assert found.kept_PG.tolist() == [[True, True], [False, False]]


def test_zero_groups_are_counted_among_those_alive():
    rewards, failed = parts([[[1.0], [1.0]], [[1.0], [0.0]], [[NAN], [NAN]], [[2.0], [NAN]]])
    sums = compute_advantages(rewards, failed, [1.0], "grpo").sums
    assert sums["frac_reward_zero_std"].tolist() == [2, 3]
    assert sums["reward_std"].tolist() == pytest.approx([math.sqrt(0.5), 3])
    assert sums["frac_reward_failed"].tolist() == [3, 8]


def test_each_reward_is_reported_by_itself():
    rewards, failed = parts([[[1.0, NAN], [0.0, 4.0], [NAN, NAN]]])
    failed[0, 2, 0] = True
    sums = component_sums(rewards, failed, ["exact", "other"])
    assert {name: pair.tolist() for name, pair in sums.items()} == {
        "rewards/exact/mean": [1.0, 2.0],
        "rewards/exact/frac_failed": [1.0, 3.0],
        "rewards/other/mean": [4.0, 1.0],
        "rewards/other/frac_failed": [0.0, 3.0],
    }


def test_numbers_of_weights_and_rewards_must_agree():
    rewards, failed = parts([[[1.0], [0.0]]])
    with pytest.raises(RLError, match="2 reward_weights but 1 rewards; give one for each"):
        compute_advantages(rewards, failed, [1.0, 1.0], "grpo")


def test_dynamic_sampling_keeps_groups_that_differ():
    """DAPO eq. 11: 0 < number of correct completions < G."""
    metric = [[1, 1, 1], [0, 0, 0], [1, 0, 0], [NAN, 1, 1], [NAN, 1, 0], [NAN, NAN, 1]]
    assert keep_groups(torch.tensor(metric)).tolist() == [False, False, True, False, True, False]


def test_kl_to_go():
    kl_T = [0.3, -0.1, 0.4]
    expected = [2.0 - 0.5 * sum(kl_T[t:]) for t in range(3)]
    assert returns_to_go(2.0, torch.tensor(kl_T), 0.5).tolist() == pytest.approx(expected)


def test_whitening_is_over_the_tokens_of_all_ranks():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, std = statistics.mean(values.tolist()), statistics.stdev(values.tolist())
    sums = sum(whitening_sums(part) for part in values.split([7, 30, 13]))
    expected = [(v - mean) / (std + EPSILON) for v in values.tolist()]
    assert whiten(values, sums).tolist() == pytest.approx(expected, rel=1e-10)
    assert whiten(values[:1], whitening_sums(values[:1])).tolist() == [0.0]

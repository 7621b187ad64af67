"""The steps that correct GRPO (GDPO's normalisation, the batch's scale, masked importance sampling,
StableReinforce's filter, entropy, completions that were cut): the same on every layout, and TRL's
numbers where one rank's test does not show them."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_mm.rl.credit import compute_advantages, over_the_batch
from megatron_mm.rl.policy_losses import Tokens, loss_denominator, policy_loss
from megatron_mm.rl.settings import RLConfig, resolve_algorithm
from support.grpo_runs import assert_same_steps, grpo_run, on_rank_steps
from support.rollouts import alone
from support.trainers import LAYOUTS

TWO = ["support.even.even", "pattern(pattern='.*[0-9].*')"]
CORRECTED = {
    "gdpo": dict(reward_funcs=TWO, multi_objective_aggregation="normalize_then_sum"),
    "batch": dict(advantage_estimator="grpo_batch"),
    "filter": dict(advantage_clip_sigma=1.2),
    # A model that has learnt nothing is near the highest entropy, where its gradient is small.
    "entropy": dict(entropy_coef=20.0),
    # Trainer and rollout agree to 1e-5: bounds as close leave out some of the tokens.
    "masked": dict(rollout_is="token", rollout_is_mode="mask", rollout_is_threshold=1.0),
}


@pytest.fixture(scope="module")
def one_rank(ranks, scenes):
    plain = {name: {} for name in CORRECTED} | {"gdpo": dict(reward_funcs=TWO)}
    return {
        name: [
            ranks(1, on_rank_steps, grpo_run(scenes, **settings), 1)[0]
            for settings in (CORRECTED[name], plain[name])
        ]
        for name in CORRECTED
    }


@pytest.mark.parametrize("name", CORRECTED)
def test_the_correction_has_a_say(one_rank, name):
    (found,), (plain,) = one_rank[name]
    assert found["reward"] == plain["reward"]
    # Rounding is below 1e-6.
    assert abs(found["train/grad_norm"] / plain["train/grad_norm"] - 1) > 1e-3
    if name == "filter":
        assert 0 < found["frac_advantage_clipped"] < 0.5
    if name == "masked":
        assert 0 < found["rollout_is/frac_masked"] < 1


@pytest.mark.parametrize("layout", ["TP2", "PP2", "CP2", "DP2"])
@pytest.mark.parametrize("name", [name for name in CORRECTED if name != "masked"])
def test_corrected_steps_do_not_depend_on_the_layout(ranks, scenes, one_rank, name, layout):
    """Masking at a bound of 1 does: there rounding decides. tests/rl/test_policy_loss.py has it."""
    size, sizes = LAYOUTS[layout]
    for rank in ranks(size, on_rank_steps, grpo_run(scenes, **CORRECTED[name], **sizes), 1):
        assert_same_steps(one_rank[name][0], rank, 2e-5)


def trl_batch(groups):
    """TRL's `scale_rewards` "batch", by loops; NaN is left out."""
    flat = [r for group in groups for r in group if r == r]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((r - mean) ** 2 for r in flat) / (len(flat) - 1))
    out = []
    for group in groups:
        valid = [r for r in group if r == r]
        centre = sum(valid) / max(1, len(valid))
        out.append([(r - centre) / (std + 1e-4) if r == r else 0.0 for r in group])
    return out


def test_the_scale_of_the_batch_is_trls_on_two_replicas():
    rl = resolve_algorithm(RLConfig(advantage_estimator="grpo_batch"))
    rewards = [[1.0, 0.0, 0.5], [2.0, 2.0, 0.25], [0.0, 0.0, 0.0], [float("nan"), 1.0, 0.0]]
    expected = torch.tensor(trl_batch(rewards))

    def of(rows):
        rewards_PGC = torch.tensor(rows).unsqueeze(2)
        return compute_advantages(rewards_PGC, rewards_PGC.isnan(), [1.0], "grpo_batch")

    whole = over_the_batch(of(rewards), rl, alone).advantages_PG
    # fp32, of numbers around 1
    torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-6)
    given: list[torch.Tensor] = []
    for rows in (rewards[:1], rewards[1:]):
        over_the_batch(of(rows), rl, lambda sums: given.append(sums) or sums)
    parts = [
        over_the_batch(of(rows), rl, lambda _: sum(given)).advantages_PG
        for rows in (rewards[:1], rewards[1:])
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("mode", "share"),
    # TRL sets the mask of a cut completion to 0. Its "dapo" divides by the tokens that are left, as
    # token-mean; its "grpo" by all completions, where seq-mean counts those that are left.
    [("token-mean", 1.0), ("seq-mean-token-mean", 2 / 3)],
)
def test_completions_that_were_cut_have_trls_loss(mode, share):
    lengths, cut = [3, 2, 4], 1
    values = torch.randn(9, generator=torch.Generator().manual_seed(0)).double()
    advantages = [0.5, -1.0, 0.5]
    ratios = values.mul(0.1).exp()
    each, start = [], 0
    for n, length in enumerate(lengths):
        r = ratios[start : start + length].tolist()
        a, start = advantages[n], start + length
        each.append([-min(x * a, min(max(x, 0.8), 1.2) * a) for x in r])
    masked = [[0.0 if n == cut else 1.0] * length for n, length in enumerate(lengths)]
    summed = [
        sum(x * m for x, m in zip(*pair, strict=True)) for pair in zip(each, masked, strict=True)
    ]
    if mode == "token-mean":
        trl = sum(summed) / sum(map(sum, masked))
    else:
        trl = sum(s / max(1.0, sum(m)) for s, m in zip(summed, masked, strict=True)) / len(lengths)
    completion = torch.tensor([0] * 3 + [-1] * 2 + [2] * 4)
    tokens = Tokens(
        values * 0.1,
        torch.zeros(9).double(),
        torch.tensor(advantages).double()[completion],
        completion,
        torch.tensor([3, 0, 4]),
    )
    rl = resolve_algorithm(RLConfig(loss_agg_mode=mode))
    loss = policy_loss(tokens, rl)[0] / loss_denominator(mode, tokens.lengths_N, 9)
    assert float(loss) * share == pytest.approx(trl, rel=1e-12)

"""Credit and policy batches from hand-made rollouts, on one rank."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch

from megatron_mm.earl.alignment import Hits
from megatron_mm.earl.settings import EARLConfig
from megatron_mm.generation.answers import answered
from megatron_mm.rl.advantages import EPSILON, Advantages
from megatron_mm.rl.completion_batch import completion_batch
from megatron_mm.rl.credit import completion_kl, credit, over_the_batch
from megatron_mm.rl.logprobs import Logprobs
from megatron_mm.rl.policy_batch import policy_batches
from megatron_mm.rl.policy_losses import LOSS_AGGREGATIONS
from megatron_mm.rl.rollout.collect import assign_steps
from megatron_mm.rl.rollout.score import Scored, informative, join
from megatron_mm.rl.settings import RLConfig, resolve_algorithm
from support.rollouts import LENGTHS, alone, prompt, scored

ALONE = (alone, alone)  # sums over the readers, and their values


def packed():
    """Two microbatches, of completions 2 and 0, and 3 and 1."""
    return [
        completion_batch(
            [answered(prompt(), torch.arange(10, 10 + LENGTHS[n]), None) for n in members],
            members,
            settings=None,
            pad_id=0,
            pad_multiple=1,
        )
        for members in ([2, 0], [3, 1])
    ]


def known(batch, old=None, ref=None) -> Logprobs:
    values = [torch.full((LENGTHS[n],), -1.0) for n in batch.members]
    return Logprobs(batch.spread(values), old, ref, None)


def settings(**changes) -> RLConfig:
    earl = {f.name: changes.pop(f.name) for f in fields(EARLConfig) if f.name in changes}
    return resolve_algorithm(RLConfig(num_generations=2, **changes), EARLConfig(**earl))


def test_a_completion_is_credited_token_by_token():
    rl = settings(algorithm="dr_grpo")
    found = credit(scored([[1.0, 0.0], [0.5, 0.5]]), [2.0], rl, None, None, alone)
    assert [t.tolist() for t in found.token_advantages] == [[1.0] * 3, [-1.0], [0.0] * 2, [0.0] * 4]
    assert found.names == ("exact",) and found.kept_N == [True] * 4


def test_the_routers_reward_and_the_kl_are_rewards_of_their_own():
    rl = settings(
        algorithm="dr_grpo", beta=0.5, use_kl_in_reward=True, kl_estimator="k1",
        router_reward_weight=2.0,
    )  # fmt: skip
    sums_NS4 = torch.zeros(4, 1, 4, dtype=torch.float64)
    sums_NS4[:, 0, 2] = 1.0
    sums_NS4[1, 0, 3] = 0.25
    kl = [torch.full((n,), 0.1) for n in LENGTHS]
    before = scored([[1.0, 0.0], [0.0, 0.0]])
    found = credit(before, [1.0], rl, Hits(*[sums_NS4] * 3), kl, alone)
    assert found.names == ("exact", "router", "kl")
    totals = [1 - 0.5 * 0.3, 2 * 0.25 - 0.5 * 0.1, -0.5 * 0.2, -0.5 * 0.4]
    assert found.advantages.rewards_PG.flatten().tolist() == pytest.approx(totals)
    assert found.scored.rewards_PGC.shape == (2, 2, 1)  # the functions' own stay


def test_the_kl_is_no_reward_of_a_completion_to_which_no_other_applies():
    """Its cost alone would punish what nothing judged."""
    rl = settings(algorithm="dr_grpo", beta=0.5, use_kl_in_reward=True, kl_estimator="k1")
    kl = [torch.full((n,), 0.1) for n in LENGTHS]
    nothing_failed = [[False, False], [False, False]]
    before = scored([[1.0, math.nan], [0.5, 0.0]], failed=nothing_failed)
    found = credit(before, [1.0], rl, None, kl, alone)
    assert found.kept_N == [True, False, True, True]
    assert found.token_advantages[0].tolist() == found.token_advantages[1].tolist() * 3 == [0.0] * 3
    unjudged = credit(before, [0.0], rl, None, kl, alone)  # where nothing else is a reward at all
    assert unjudged.kept_N == [True] * 4


@pytest.mark.parametrize("algorithm", ["dr_grpo", "reinforce_plus_plus"])
def test_a_teacher_teaches_where_no_reward_applies_but_not_where_one_failed(algorithm):
    rl = settings(algorithm=algorithm, teacher_load=["t"], teacher_kl_coef=2.0)
    before = scored([[1.0, 0.0], [math.nan, math.nan]], failed=[[False, False], [False, True]])
    gaps = [torch.full((n,), 0.25) for n in LENGTHS]
    found = credit(before, [1.0], rl, None, None, alone, gaps)
    alone_judged = credit(before, [1.0], rl, None, None, alone)
    assert found.kept_N == [True, True, True, False]
    assert alone_judged.kept_N == [True, True, False, False]
    assert found.token_advantages[2].tolist() == [0.5] * 2  # the gap alone
    for n in (0, 1):
        assert torch.equal(found.token_advantages[n], alone_judged.token_advantages[n] + 0.5)
    batches = policy_batches(packed(), [known(b) for b in packed()], found, rl, None, *ALONE)
    assert [int(n) for b in batches for n in b.lengths_N] == [2, 3, 0, 1]


def test_the_kl_of_a_completion_is_found_in_whatever_microbatch_it_is():
    batches = packed()
    logprobs = [
        known(batch, batch.spread([torch.full((LENGTHS[n],), n / 10) for n in batch.members]),
              torch.zeros(len(batch.tokens_T)))
        for batch in batches
    ]  # fmt: skip
    found = completion_kl(batches, logprobs, "k1")
    assert [kl.tolist() for kl in found] == [
        [pytest.approx(n / 10)] * length for n, length in enumerate(LENGTHS)
    ]


def test_whitening_leaves_out_failures():
    rl = settings(algorithm="reinforce_plus_plus")
    found = credit(scored([[1.0, math.nan], [0.0, 1.0]]), [1.0], rl, None, None, alone)
    values = torch.tensor([1.0] * 3 + [0.0] * 2 + [1.0] * 4)
    expected = (1.0 - values.mean()) / (values.std() + EPSILON)
    assert found.token_advantages[0].tolist() == pytest.approx([float(expected)] * 3, rel=1e-6)
    assert found.kept_N == [True, False, True, True]


def test_policy_batches_hold_what_was_credited_and_leave_failures_out():
    rl = settings(algorithm="dr_grpo")
    found = credit(scored([[1.0, 0.0], [math.nan, 0.5]]), [1.0], rl, None, None, alone)
    batches = packed()
    one, other = policy_batches(batches, [known(b) for b in batches], found, rl, None, *ALONE)
    assert one.lengths_N.tolist() == [0, 3] and other.lengths_N.tolist() == [4, 1]
    assert one.completion_T.tolist() == [-1] * 5 + [1, 1, 1, -1]
    assert one.advantages_T.tolist() == [0.0] * 5 + [0.5] * 3 + [0.0]
    assert other.advantages_T[other.sampled].tolist() == [0.0] * 4 + [-0.5]
    assert one.router is None and one.old_logprobs_T is None
    assert one.skill_T is None  # without a skill map
    # The microbatches that forward passes read stay as they were.
    assert batches[0].lengths_N.tolist() == [2, 3] and (batches[0].completion_T == 0).sum() == 2


@pytest.mark.parametrize("mode", [*LOSS_AGGREGATIONS])
def test_what_routers_lose_is_weighed_like_the_policy_loss(mode):
    """The balancing loss of a microbatch is divided by what the policy loss of the step is: else
    its coefficient would mean another with every length of completions."""
    rl = settings(algorithm="grpo", loss_agg_mode=mode, max_completion_length=4)
    found = credit(scored([[1.0, 0.0], [math.nan, 0.5]]), [1.0], rl, None, None, alone)
    batches = packed()
    made = policy_batches(batches, [known(b) for b in batches], found, rl, None, *ALONE)
    kept = torch.tensor([3, 1, 4])  # lengths without the one that failed
    whole = LOSS_AGGREGATIONS[mode].denominator(kept, 4)
    assert sum(float(batch.loss_weight) for batch in made) == float(whole)
    assert all(float(batch.loss_weight) == float(batch.divisor) for batch in made)


def test_policy_batches_hold_the_skill_of_every_position():
    spans = (([(0, 2, 1, True)], [(0, 1, 0, True)]), ([(0, 2, 0, True)], [(1, 3, 0, False)]))
    rl = settings(algorithm="dr_grpo", skill_map="map.json")
    found = credit(scored([[1.0, 0.0], [0.0, 0.5]], spans), [1.0], rl, None, None, alone)
    batches = packed()
    one, other = policy_batches(batches, [known(b) for b in batches], found, rl, None, *ALONE)
    # A prompt has two tokens; the second one's router decides the first token sampled.
    assert one.skill_T.tolist() == [-1, 0, 0, -1, -1, 1, 1, -1, -1]
    assert other.skill_T.tolist() == [-1, -1, 0, 0, -1, -1, -1, 0, -1]


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_router_targets_stand_at_the_positions_of_their_tokens(temperature):
    rl = settings(
        algorithm="dr_grpo", loss_agg_mode="token-mean", router_loss_coeff=0.3,
        router_temperature=temperature, skill_map="map.json",
    )  # fmt: skip
    member_SLE = torch.zeros(2, 3, 4, dtype=torch.bool)
    member_SLE[0, :, 1] = True  # skill 0 has experts in three layers, skill 1 in one
    member_SLE[1, 0, 2] = True
    spans = (([(0, 2, 1, True)], [(0, 1, 0, True)]), ([(0, 2, 0, True)], [(1, 3, 0, False)]))
    before = scored([[1.0, 0.25], [math.nan, 0.5]], spans)
    # A reward of the routers' own is no part of the task's.
    hits = Hits(*[torch.zeros(4, 2, 4, dtype=torch.float64)] * 3)
    found = credit(before, [1.0], rl, hits, None, alone)
    batches = packed()
    one, other = policy_batches(batches, [known(b) for b in batches], found, rl, member_SLE, *ALONE)
    assert one.skill_T[one.sampled].tolist() == [0, 0, 1, 1, -1]
    mine, theirs = (batch.router.weight_T[batch.sampled].tolist() for batch in (one, other))
    if temperature:  # every labelled token but the first of a completion; completion 2 failed
        assert mine == [0, 0, 0, 0.375, 0] and theirs == [0, 0, 0, 0, 0]
        counted = 1 * 1 + 2 * 3
    else:  # reward x right
        assert mine == [0, 0, 1, 1, 0] and theirs == [0, 0, 0, 0, 0.25]
        counted = 2 * 1 * 1 + 0.25 * 3
    assert not one.router.weight_T[~one.loss_mask_T.bool()].any()
    assert one.router.scale == other.router.scale == pytest.approx(0.3 * (3 + 1 + 4) / counted)


def test_rounds_join_and_groups_are_chosen():
    first = scored([[1.0, 0.0], [0.5, 0.5]], seconds={"generate": 1.0}, skipped=("a",))
    second = scored([[math.nan, 1.0], [0.0, 2.0]], numbers=(5, 3), seconds={"generate": 2.0})
    assert informative(first, [1.0]) == [0] and informative(second, [1.0]) == [1]
    both = join([first.only([0]), second.only([1])])
    assert [group.number for group in both.groups] == [0, 3]
    assert both.rewards_PGC.squeeze(2).tolist() == [[1.0, 0.0], [0.0, 2.0]]
    assert (both.rounds, both.generated, both.skipped) == (2, 8, ("a",))
    assert both.seconds == {"generate": 3.0}
    assert first.only([]).rewards_PGC.shape == (0, 2, 1)


def test_steps_follow_from_the_order_of_the_data_over_all_replicas():
    chosen, steps = assign_steps([9, 2, 4], [9, 2, 4, 1, 7, 3], prompts=5, prompts_per_step=2)
    # In order 1 2 | 3 4 | 7; number 9 is too much.
    assert chosen == [1, 2] and steps.of_group == (0, 1) and steps.count == 3


def trl_gdpo(rewards, weights):
    """TRL's `normalize_then_sum`, by loops: each reward over the deviation of its group, their
    weighted sum, then once more over the whole batch. rewards: [P][G][C]."""
    sums = []
    for group in rewards:
        columns = []
        for values in zip(*group, strict=True):
            mean = sum(values) / len(values)
            std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
            columns.append([(v - mean) / (std + EPSILON) for v in values])
        sums.append(
            [
                sum(w * c[g] for w, c in zip(weights, columns, strict=True))
                for g in range(len(group))
            ]
        )
    flat = [value for group in sums for value in group]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((v - mean) ** 2 for v in flat) / (len(flat) - 1))
    return [[(v - mean) / (std + EPSILON) for v in group] for group in sums]


def of_rewards(rewards_PGC: list) -> Scored:
    rewards = torch.tensor(rewards_PGC)
    one = scored(rewards[..., 0].tolist())
    return replace(
        one,
        names=("a", "b"),
        rewards_PGC=rewards,
        failed_PGC=rewards.isnan() & False,
    )


def credited_by(rewards, rl, sum_over=alone):
    return credit(of_rewards(rewards), [2.0, 0.5], rl, None, None, sum_over)


TWO = [[[1.0, 10.0], [0.0, 30.0]], [[1.0, 20.0], [1.0, 25.0]]]


def test_rewards_normalised_one_by_one_are_normalised_together_at_the_end():
    rl = settings(multi_objective_aggregation="normalize_then_sum")
    found = credited_by(TWO, rl).advantages.advantages_PG
    torch.testing.assert_close(found, torch.tensor(trl_gdpo(TWO, [2.0, 0.5])), rtol=1e-5, atol=1e-6)


def test_an_idle_group_stays_at_zero_and_counts_in_the_batch():
    """Three advantages are left of the first group, whose mean is not 0 once one has failed."""
    rl = settings(multi_objective_aggregation="normalize_then_sum")
    idle = [[1.0, 20.0], [1.0, 20.0]]
    found = credited_by([TWO[0], idle], rl).advantages.advantages_PG
    assert found[1].tolist() == [0.0, 0.0]
    expected = trl_gdpo([TWO[0], idle], [2.0, 0.5])[0]
    assert found[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_two_replicas_normalise_as_one():
    rl = settings(multi_objective_aggregation="normalize_then_sum", advantage_clip_sigma=1.5)
    values = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))

    def of(rows):
        return Advantages(rows, rows, torch.ones_like(rows, dtype=torch.bool), {})

    whole = over_the_batch(of(values), rl, alone).advantages_PG
    given = []
    for part in values.split(2):
        over_the_batch(of(part), rl, lambda sums: given.append(sums) or sums)
    assert len(given) == 2  # one exchange
    parts = [over_the_batch(of(p), rl, lambda _: sum(given)).advantages_PG for p in values.split(2)]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("estimator", ["grpo_batch"])
def test_the_scale_of_the_batch(estimator):
    """TRL's scale_rewards "batch": r - mean of the group, over the deviation of all rewards."""
    rewards = [[1.0, 0.0], [0.5, 0.25]]
    rl = settings(advantage_estimator=estimator)
    found = credit(scored(rewards), [1.0], rl, None, None, alone).advantages.advantages_PG
    std = float(torch.tensor(rewards).flatten().std()) + EPSILON
    expected = [[0.5 / std, -0.5 / std], [0.125 / std, -0.125 / std]]
    assert found.flatten().tolist() == pytest.approx(sum(expected, []), rel=1e-5)


def test_advantages_far_from_the_others_are_left_out():
    rewards = [[1.0, 0.0], [0.0, 0.0]]
    rl = settings(algorithm="dr_grpo", advantage_clip_sigma=1.0)
    found = credit(scored(rewards), [1.0], rl, None, None, alone).advantages
    # +-0.5 and two zeros: a deviation of 0.408, so both are 1.22 of it away.
    assert found.advantages_PG.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert found.sums["frac_advantage_clipped"].tolist() == [2, 4]
    rl = settings(algorithm="dr_grpo", advantage_clip_sigma=1.5)
    found = credit(scored(rewards), [1.0], rl, None, None, alone).advantages
    assert found.advantages_PG[0].tolist() == pytest.approx(
        [0.5 / 0.40835, -0.5 / 0.40835], rel=1e-3
    )


def test_completions_that_were_cut_leave_the_loss_but_not_their_group():
    before = scored([[1.0, 0.0], [0.5, 0.5]])
    groups = tuple(
        replace(
            group,
            completions=tuple(replace(c, finished=n != 1) for n, c in enumerate(group.completions)),
        )
        for group in before.groups
    )
    before = replace(before, groups=groups)
    plain = credit(before, [1.0], settings(), None, None, alone)
    rl = settings(mask_truncated_completions=True)
    found = credit(before, [1.0], rl, None, None, alone)
    assert torch.equal(found.advantages.advantages_PG, plain.advantages.advantages_PG)
    assert plain.kept_N == [True] * 4 and found.kept_N == [True, False, True, False]
    batches = policy_batches(packed(), [known(b) for b in packed()], found, rl, None, *ALONE)
    assert [int(n) for b in batches for n in b.lengths_N] == [2, 3, 0, 0]


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_routers_learn_nothing_from_completions_that_were_cut(temperature):
    rl = settings(
        algorithm="dr_grpo", router_loss_coeff=0.3, router_temperature=temperature,
        skill_map="map.json", mask_truncated_completions=True,
    )  # fmt: skip
    spans = (([(0, 2, 0, True)], [(0, 1, 0, True)]), ([(0, 2, 0, True)], [(1, 3, 0, True)]))
    before = scored([[1.0, 0.5], [0.5, 1.0]], spans)
    groups = tuple(
        replace(group, completions=tuple(replace(c, finished=False) for c in group.completions))
        for group in before.groups[1:]
    )
    before = replace(before, groups=(before.groups[0], *groups))
    hits = Hits(*[torch.zeros(4, 1, 4, dtype=torch.float64)] * 3)
    found = credit(before, [1.0], rl, hits, None, alone)
    member_SLE = torch.ones(1, 3, 4, dtype=torch.bool)
    batches = packed()
    made = policy_batches(batches, [known(b) for b in batches], found, rl, member_SLE, *ALONE)
    learnt = {}
    for batch, policy in zip(batches, made, strict=True):
        parts = batch.split(policy.router.weight_T)
        learnt |= {n: bool(w.any()) for n, w in zip(batch.members, parts, strict=True)}
    # Drawn routes leave out the first token of a completion, which is all that completion 1 has.
    assert learnt == {0: True, 1: not temperature, 2: False, 3: False}

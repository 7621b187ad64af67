"""Credit and policy batches from hand-made rollouts, on one rank."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch

from megatron_mm.data.sample import Sample
from megatron_mm.earl.alignment import Hits
from megatron_mm.earl.settings import EARLConfig
from megatron_mm.generation.lanes import Completion
from megatron_mm.rl.advantages import EPSILON
from megatron_mm.rl.completion_batch import answered, completion_batch
from megatron_mm.rl.credit import completion_kl, credit
from megatron_mm.rl.logprobs import Logprobs
from megatron_mm.rl.policy_batch import policy_batches
from megatron_mm.rl.rollout.collect import assign_steps
from megatron_mm.rl.rollout.draw import Group
from megatron_mm.rl.rollout.score import Scored, informative, join
from megatron_mm.rl.settings import RLConfig, resolve_algorithm

LENGTHS = [3, 1, 2, 4]  # two groups of two completions


def alone(values: torch.Tensor) -> torch.Tensor:
    """The sum over readers on one rank."""
    return values


def scored(rewards, spans=None, failed=None, numbers=(0, 1), **changes) -> Scored:
    completions = [
        Completion(torch.arange(10, 10 + n), torch.full((n,), -1.0), True) for n in LENGTHS
    ]
    groups = tuple(
        Group(number, tuple(completions[2 * p : 2 * p + 2]), None)
        for p, number in enumerate(numbers)
    )
    rewards_PGC = torch.tensor(rewards).unsqueeze(2)
    values = dict(
        groups=groups,
        names=("exact",),
        rewards_PGC=rewards_PGC,
        failed_PGC=torch.tensor(failed).unsqueeze(2) if failed else rewards_PGC.isnan(),
        spans=spans or tuple(([], []) for _ in groups),
        rounds=1,
        generated=4,
        missing=0,
        skipped=(),
        failures=(),
        seconds={"generate": 1.0},
    )
    return Scored(**(values | changes))


def packed():
    """Two microbatches, of completions 2 and 0, and 3 and 1."""
    return [
        completion_batch(
            [answered(prompt(), torch.arange(10, 10 + LENGTHS[n])) for n in members],
            members,
            settings=None,
            pad_id=0,
            pad_multiple=1,
        )
        for members in ([2, 0], [3, 1])
    ]


def prompt() -> Sample:
    return Sample(torch.tensor([5, 6]), torch.tensor([6, 6]), torch.zeros(2), [], "rows:1")


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
    one, other = policy_batches(batches, [known(b) for b in batches], found, rl, None, alone)
    assert one.lengths_N.tolist() == [0, 3] and other.lengths_N.tolist() == [4, 1]
    assert one.completion_T.tolist() == [-1] * 5 + [1, 1, 1, -1]
    assert one.advantages_T.tolist() == [0.0] * 5 + [0.5] * 3 + [0.0]
    assert other.advantages_T[other.sampled].tolist() == [0.0] * 4 + [-0.5]
    assert one.router is None and one.old_logprobs_T is None
    assert one.skill_T is None  # without a skill map
    # The microbatches that forward passes read stay as they were.
    assert batches[0].lengths_N.tolist() == [2, 3] and (batches[0].completion_T == 0).sum() == 2


def test_policy_batches_hold_the_skill_of_every_position():
    spans = (([(0, 2, 1, True)], [(0, 1, 0, True)]), ([(0, 2, 0, True)], [(1, 3, 0, False)]))
    rl = settings(algorithm="dr_grpo", skill_map="map.json")
    found = credit(scored([[1.0, 0.0], [0.0, 0.5]], spans), [1.0], rl, None, None, alone)
    batches = packed()
    one, other = policy_batches(batches, [known(b) for b in batches], found, rl, None, alone)
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
    one, other = policy_batches(batches, [known(b) for b in batches], found, rl, member_SLE, alone)
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

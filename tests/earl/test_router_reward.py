"""The router's reward and term against scalar references; sums that any split leaves equal."""

import math
from itertools import permutations

import pytest
import torch

from megatron_mm.earl.router_reward import hit_rates, hit_sums, label_positions, router_reward
from megatron_mm.earl.router_term import (
    cluster_log_mass,
    drawn_log_probability,
    drawn_router_loss,
    drawn_weights,
    rewarded_weights,
    sum_counted,
)
from megatron_mm.errors import RLError

T, L, K, E, S, N = 40, 3, 2, 8, 3, 4


def make(seed=0):
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    routes = random(T, L, E).topk(K, dim=2).indices.to(torch.int16)
    skill = torch.randint(-1, S, (T,), generator=generator)
    correct = random(T) < 0.6
    completion = torch.arange(N).repeat_interleave(T // N)
    member = random(S, L, E) < 0.4
    member[1, 2] = False  # a skill without experts in one layer
    return routes, skill, correct, completion, member


def reference(routes, skill, correct, completion, member):
    """Returns the reward of each completion, position by position."""
    rewards = []
    for n in range(N):
        earned = count = 0.0
        for t in range(T):
            s = int(skill[t])
            if completion[t] != n or s < 0:
                continue
            for layer in range(L):
                cluster = {e for e in range(E) if member[s, layer, e]}
                if not cluster:
                    continue
                share = sum(int(e) in cluster for e in routes[t, layer]) / K
                count += 1
                earned += (share - len(cluster) / E) if correct[t] else 0.0
        rewards.append(max(0.0, earned / count) if count else 0.0)
    return rewards


@pytest.mark.parametrize("seed", range(5))
def test_the_reward_equals_its_definition(seed):
    routes, skill, correct, completion, member = make(seed)
    sums = hit_sums(routes, skill, correct, completion, N, member)
    expected = reference(routes, skill, correct, completion, member)
    assert router_reward(sums).tolist() == pytest.approx(expected, abs=1e-12)


def test_sums_add_up_over_positions_and_layers():
    """Context-parallel ranks hold positions, pipeline ranks layers."""
    routes, skill, correct, completion, member = make()
    whole = hit_sums(routes, skill, correct, completion, N, member)
    parts = 0
    for t in (slice(0, 13), slice(13, T)):
        for layers in (slice(0, 1), slice(1, L)):
            parts += hit_sums(
                routes[t, layers], skill[t], correct[t], completion[t], N, member[:, layers]
            )
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


def test_spans_become_labels():
    skill, correct = label_positions(7, [(5, 7, -1, True), (1, 3, 0, True), (3, 4, 2, False)])
    assert skill.tolist() == [-1, 0, 0, 2, -1, -1, -1]
    assert correct.tolist() == [False, True, True, False, False, True, True]
    assert label_positions(0, [])[0].shape == (0,)
    for spans in ([(0, 3, 0, True), (2, 4, 1, True)], [(3, 8, 0, True)], [(2, 2, 0, True)]):
        with pytest.raises(RLError, match="spans may be neither empty nor overlap"):
            label_positions(7, spans)


def test_a_chance_router_earns_nothing_and_a_perfect_one_the_rest():
    generator = torch.Generator().manual_seed(0)
    many = 20000
    member = torch.zeros(1, 1, E, dtype=torch.bool)
    member[0, 0, :2] = True
    zeros, right = torch.zeros(many, dtype=torch.int64), torch.ones(many, dtype=torch.bool)
    routes = torch.rand(many, 1, E, generator=generator).topk(K, dim=2).indices
    sums = hit_sums(routes.short(), zeros, right, zeros, 1, member)
    # 20,000 positions: one standard deviation of the share is some 0.002.
    assert float(router_reward(sums)) < 0.01
    assert hit_rates(sums[0])[0].tolist() == pytest.approx([0.25, 0.25], abs=0.01)
    perfect = torch.arange(K, dtype=torch.int16).expand(many, 1, K)
    sums = hit_sums(perfect, zeros, right, zeros, 1, member)
    assert float(router_reward(sums)) == pytest.approx(0.75)
    assert hit_rates(sums[0])[0].tolist() == [1.0, 0.25]
    assert float(router_reward(hit_sums(perfect, zeros, ~right, zeros, 1, member))) == 0


def test_never_below_zero_and_nothing_without_a_span():
    routes, skill, correct, completion, member = make()
    nowhere = torch.full_like(skill, -1)
    sums = hit_sums(routes, nowhere, correct, completion, N, member)
    assert not sums.any() and not router_reward(sums).any()
    assert hit_rates(sums.sum(0)).isnan().all()
    away = torch.zeros(S, L, E, dtype=torch.bool)
    away[:, :, 0] = True
    missed = routes.masked_fill(routes == 0, 1)
    assert not router_reward(hit_sums(missed, skill, correct, completion, N, away)).any()


@pytest.mark.parametrize("route", [-1, E])
def test_a_route_that_was_not_recorded_is_no_expert(route):
    routes, skill, correct, completion, member = make()
    routes[skill == 1, 2, 0] = route
    with pytest.raises(RLError, match=f"the first is {route}, experts are 0 to 7"):
        hit_sums(routes, skill, correct, completion, N, member)
    skill[skill == 1] = -1  # where nothing is labelled it does not matter
    hit_sums(routes, skill, correct, completion, N, member)


def mass(logits, s, cluster):
    total = sum(math.exp(x) for x in logits)
    return math.log(sum(math.exp(logits[e]) for e in cluster) / total)


def assert_slopes(gradient, loss, rows):
    """Asserts that the gradient is that of `loss` at `rows`, by central differences."""
    for t in range(T):
        for e in range(E):
            kept = rows[t][e]
            rows[t][e] = kept + 1e-5
            above = loss(rows)
            rows[t][e] = kept - 1e-5
            slope = (above - loss(rows)) / 2e-5
            rows[t][e] = kept
            assert float(gradient[t, e]) == pytest.approx(slope, abs=1e-8)


def test_the_router_term_equals_its_definition_and_its_gradient():
    _, skill, _, _, member_SLE = make()
    member = member_SLE[:, 2]  # where skill 1 has no experts
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(T, E, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.rand(T, dtype=torch.float64, generator=generator) * (skill >= 0)

    def loss(rows):
        total = 0.0
        for t, row in enumerate(rows):
            s = int(skill[t])
            cluster = [e for e in range(E) if s >= 0 and member[s, e]]
            if cluster:
                total -= float(weights[t]) * mass(row, s, cluster)
        return total

    found = -(weights * cluster_log_mass(logits, skill, member)).sum()
    rows = logits.detach().tolist()
    assert float(found.detach()) == pytest.approx(loss(rows), rel=1e-12)
    found.backward()
    assert_slopes(logits.grad, loss, rows)


def test_the_router_term_pulls_towards_the_cluster_only():
    member = torch.tensor([[True, True, False, False], [False, False, False, True]])
    logits = torch.zeros(2, 4, requires_grad=True)
    (-cluster_log_mass(logits, torch.tensor([0, -1]), member)).sum().backward()
    assert logits.grad[0].tolist() == [-0.25, -0.25, 0.25, 0.25]
    assert logits.grad[1].tolist() == [0.25, 0.25, 0.25, -0.75]  # the last row is that of no skill
    sure = torch.tensor([[60.0, 0.0, -60.0, -60.0]], requires_grad=True)
    cluster_log_mass(sure, torch.tensor([0]), member).sum().backward()
    assert sure.grad.abs().max() < 1e-6
    half = cluster_log_mass(torch.zeros(1, 4, dtype=torch.bfloat16), torch.tensor([0]), member)
    assert half.dtype == torch.float32 and float(half) == pytest.approx(math.log(0.5))


def test_right_spans_of_a_completion_weigh_its_reward():
    spans = [(0, 2, 1, True), (3, 4, 0, False), (4, 5, -1, True), (5, 6, 0, True)]
    found = rewarded_weights(7, spans, 0.75)
    assert found.skill_G.tolist() == [1, 1, -1, 0, -1, 0, -1]
    assert found.weight_G.tolist() == [0.75, 0.75, 0, 0, 0, 0.75, 0]
    assert torch.equal(found.counted_G, found.weight_G)
    for reward in (math.nan, -1.0, 0.0):  # left out, punished, wrong
        assert not rewarded_weights(7, spans, reward).weight_G.any()
    member = torch.zeros(2, 3, 4, dtype=torch.bool)
    member[0, :, 1] = member[1, 0, 2] = True  # three layers, one layer
    assert sum_counted([found, found], member) == 2 * (2 * 0.75 * 1 + 0.75 * 3)


# ---- drawn experts ----


def test_every_drawn_expert_of_a_span_weighs_the_bounded_advantage():
    spans = [(0, 2, 1, True), (2, 4, 0, False)]
    advantages = torch.tensor([3.0, 3.0, -1.0, -3.0, 1.0])
    found = drawn_weights(spans, advantages, kept=True, clip=2.0)
    # Not the first token: the prompt's own pass took its experts.
    assert found.weight_G.tolist() == [0, 2, -1, -2, 0]
    assert found.counted_G.tolist() == [0, 1, 1, 1, 0]
    assert not drawn_weights(spans, advantages, kept=False, clip=2.0).counted_G.any()


def log_of_draw(logits, experts, temperature):
    """Returns the log-probability of drawing one expert after the other, by hand."""
    left, total = {e: math.exp(x / temperature) for e, x in enumerate(logits)}, 0.0
    for expert in experts:
        total += math.log(left[expert] / sum(left.values()))
        del left[expert]
    return total


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_term_of_drawn_experts_equals_its_definition_and_its_gradient(temperature):
    routes, skill, _, _, member_SLE = make()
    member, drawn = member_SLE[:, 2], routes[:, 2].clone()
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(T, E, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.randn(T, dtype=torch.float64, generator=generator)
    asked = [bool(s >= 0 and member[s].any()) for s in skill]
    assert 5 < sum(asked) < T - 5
    drawn[~torch.tensor(asked)] = -1  # as where nothing was recorded

    def loss(rows):
        return -sum(
            float(weights[t]) * log_of_draw(rows[t], drawn[t].tolist(), temperature)
            for t in range(T)
            if asked[t]
        )

    found = drawn_router_loss(logits, drawn, skill, weights, member, temperature)
    rows = logits.detach().tolist()
    assert float(found.detach()) == pytest.approx(loss(rows), rel=1e-12)
    found.backward()
    assert_slopes(logits.grad, loss, rows)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_all_draws_together_are_certain(k):
    ways = torch.tensor(list(permutations(range(3), k)))
    logits = torch.tensor([0.3, -1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    logprobs = drawn_log_probability(logits.expand(len(ways), -1), ways, 0.7)
    assert logprobs.dtype == torch.float32
    assert float(logprobs.detach().exp().sum()) == pytest.approx(1.0, abs=1e-6)
    logprobs.exp().sum().backward()  # of 1: in bf16 a rounding of 2^-8 of terms below 1
    assert logits.grad.abs().max() < 2**-8

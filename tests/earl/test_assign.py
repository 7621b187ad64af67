"""Exclusive clusters and effects from figures whose truth is known."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from megatron_mm.earl.assign import (
    Assignment,
    agreement,
    assign,
    cluster_sizes,
    own_and_others,
    relative,
)
from megatron_mm.earl.count_probe import ProbeCounts
from megatron_mm.earl.knock_out import LossSums
from megatron_mm.earl.knock_out_map import discover_by_knock_out
from megatron_mm.earl.make_map import discover_by_lift
from megatron_mm.earl.removals import effects, removals
from megatron_mm.earl.route_counts import count_routes
from megatron_mm.errors import RLError

S, L, E, K = 3, 2, 8, 2


def effect_of(seed, skills=S, layers=L, experts=E):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(skills, layers, experts, generator=generator, dtype=torch.float64)


def test_clusters_are_exclusive_balanced_and_the_best():
    effect = effect_of(1)
    used = torch.tensor([[0, 9, 1, 2, 9, 0, 0, 0], [5, 0, 0, 7, 0, 0, 6, 0]])
    found = assign(effect, used, own=2, common=2)
    assert found.common == [[1, 4], [3, 6]]
    value = relative(effect)
    for layer in range(L):
        clusters = [skill[layer] for skill in found.skills]
        everyone = [*itertools.chain(*clusters), *found.common[layer]]
        assert sorted(everyone) == [*range(E)] and {len(c) for c in clusters} == {2}
        free = [e for e in range(E) if e not in found.common[layer]]
        reached = sum(float(value[s, layer, e]) for s, c in enumerate(clusters) for e in c)
        best = max(
            sum(float(value[i // 2, layer, e]) for i, e in enumerate(order))
            for order in itertools.permutations(free)
        )
        assert reached == pytest.approx(best, rel=1e-12)


def test_experts_that_remain_belong_to_nobody():
    found = assign(effect_of(2), torch.zeros(L, E), own=1, common=3)
    for layer in range(L):
        assert found.common[layer] == [0, 1, 2]  # of equally used ones the first
        assert all(len(skill[layer]) == 1 for skill in found.skills)


def test_a_skill_counts_by_its_own_largest_effect():
    effect = effect_of(3).abs()
    scaled = effect * torch.tensor([1.0, 1e-4, 50.0]).double()[:, None, None]
    used = torch.zeros(L, E)
    assert assign(effect, used, 2, 2) == assign(scaled, used, 2, 2)
    harmless = -effect_of(3).abs()
    assert relative(harmless).abs().max() == 0


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ((8, 2, 3, None, None), (2, 2)),
        ((8, 2, 6, None, None), (1, 2)),
        ((32, 4, 8, None, None), (3, 4)),
        ((8, 2, 2, 3, None), (3, 2)),
        ((8, 2, 3, None, 5), (1, 5)),
        ((8, 2, 7, None, 1), (1, 1)),
    ],
)
def test_sizes_of_clusters(given, sizes):
    assert cluster_sizes(*given) == sizes


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        (
            (8, 2, 7, None, None),
            "7 skills x 1 experts of their own + 2 common ones are 9, .* has 8",
        ),
        (
            (8, 2, 3, 3, None),
            "3 skills x 3 experts of their own \\+ 2 common ones are 11, .* has 8",
        ),
    ],
)
def test_too_many_skills_for_exclusive_clusters(given, numbers):
    with pytest.raises(RLError, match=numbers.replace(" + ", r" \+ ")) as caught:
        cluster_sizes(*given)
    assert "\n" not in str(caught.value)


def test_own_and_others_are_means_over_the_clusters():
    effect = effect_of(4)
    found = Assignment([[0], [1]], [[[1, 2], [3]], [[4], [5, 6]], [[7], [7]]])
    cells = [(0, 1), (0, 2), (1, 3)]
    own = sum(float(effect[0, a, b]) for a, b in cells) / 3
    assert float(own_and_others(found, effect)[0, 0]) == pytest.approx(own)
    others = sum(float(effect[i, a, b]) for a, b in cells for i in (1, 2)) / 6
    assert float(own_and_others(found, effect)[0, 1]) == pytest.approx(others)


def test_chance_is_that_of_random_assignments():
    """The mean of the hypergeometric law, and z 0 +- 1 over random pairs."""
    rng = random.Random(0)

    def drawn():
        skills = [[], [], []]
        common = []
        for _ in range(L):
            order = rng.sample(range(E), E)
            common.append(sorted(order[:2]))
            for s in range(S):
                skills[s].append(sorted(order[2 + 2 * s : 4 + 2 * s]))
        return Assignment(common, skills)

    found = [agreement(drawn(), drawn(), E) for _ in range(200)]
    z = torch.tensor([one.z for one in found])
    # Means of 200 draws: standard errors of 0.07 and 0.05.
    assert float(z.mean()) == pytest.approx(0, abs=0.25)
    assert float(z.std()) == pytest.approx(1, abs=0.2)
    same = drawn()
    exact = agreement(same, same, E)
    assert exact.jaccard == 1 and exact.z > 3 and exact.cells == S * L
    # Beside the same common experts two random pairs of 6 share 0 (p 6/15), 1 (8/15) or 2 (1/15).
    assert exact.chance == pytest.approx(8 / 15 / 3 + 1 / 15, abs=0.02)


def test_each_expert_is_removed_on_its_own():
    planned = removals(L, E, K, None, seed=1)
    assert planned == [(layer, (expert,)) for layer in range(L) for expert in range(E)]
    truth = effect_of(5)
    rise = torch.stack([truth[:, layer, expert] for layer, (expert,) in planned])
    assert torch.equal(effects(rise, planned, L, E), truth)


def test_random_sets_find_the_experts_that_matter():
    """192 passes in place of 256: additive effects of 3 of 128 experts of a layer, above those of
    all others, which are small and harmful."""
    layers, experts = 2, 128
    planned = removals(layers, experts, 8, 192, seed=2)
    assert len(planned) == 192 and planned == removals(layers, experts, 8, 192, seed=2)
    uses = torch.zeros(layers, experts, dtype=torch.int64)
    for layer, inside in planned:
        assert len(inside) == 16 == len({*inside})
        uses[layer, list(inside)] += 1
    assert uses.min() == uses.max() == 12
    generator = torch.Generator().manual_seed(3)
    truth = 0.01 + 0.005 * torch.randn(S, layers, experts, generator=generator).double()
    planted = {
        (s, layer): [7 + 20 * s, 8 + 20 * s, 90 + s + 5 * layer]
        for s in range(S)
        for layer in (0, 1)
    }
    for (s, layer), inside in planted.items():
        truth[s, layer, inside] = 1.0
    rise = torch.stack([truth[:, layer, list(inside)].sum(1) for layer, inside in planned])
    found = effects(rise, planned, layers, experts)
    for (s, layer), inside in planted.items():
        assert sorted(found[s, layer].topk(3).indices.tolist()) == inside


@pytest.mark.parametrize("passes", [15, 256, 300])
def test_too_few_or_too_many_passes(passes):
    with pytest.raises(
        RLError, match=f"--passes is {passes}; 2 layers of 128 experts need 16 .* 256"
    ):
        removals(2, 128, 8, passes, seed=1)


def test_a_layer_must_keep_as_many_experts_as_a_token_takes():
    with pytest.raises(RLError, match="2 experts of which a token needs 2"):
        removals(1, 2, 2, None, seed=1)
    assert {len(inside) for _, inside in removals(1, 24, 22, 20, seed=1)} == {2}


# ---- maps of routes and losses ----

PLANTED = [[[2, 5], [0, 1]], [[3, 6], [2, 3]], [[4, 7], [4, 5]]]
COMMON = [[0, 1], [6, 7]]
NAMES = ["a", "b", "c"]


def routes_without_a_trace(seed):
    """Returns counts of routes that follow the token and never the skill."""
    rng = random.Random(seed)
    routes, skills, tokens = [], [], []
    for _ in range(2000):
        skill, token = rng.randrange(S), rng.randrange(12)
        routes.append(
            [rng.sample([token % E, (token + 1) % E, (token + 3) % E], K) for _ in range(L)]
        )
        skills.append(skill)
        tokens.append(token)
    return count_routes(
        torch.tensor(routes, dtype=torch.int16),
        torch.tensor(skills),
        torch.tensor(tokens),
        E,
        S,
        12,
    )


def losses(planted, shuffles=19, noise=0.02, seed=1):
    """Returns sums of losses in which a skill misses its planted experts by about 1 nat, all skills
    miss the common ones by 0.5, and the shuffled labellings miss all alike."""
    generator = torch.Generator().manual_seed(seed)
    rise = noise * torch.randn(L * E, 2, 1 + shuffles, S, generator=generator).double()
    for layer in range(L):
        rise[[layer * E + e for e in COMMON[layer]]] += 0.5
        for s in range(S):
            for e in PLANTED[s][layer]:
                rise[layer * E + e, :, 1:] += 1 / S
                if planted:
                    rise[layer * E + e, :, 0, s] += 1
                else:
                    rise[layer * E + e, :, 0] += 1 / S
    tokens = torch.tensor([300.0, 200.0, 100.0]).double().expand(2, 1 + shuffles, S).clone()
    base = 2.0 * tokens.unsqueeze(0)
    return LossSums(torch.cat((base, base + rise * tokens)), tokens)


def mapped(sums, counted, **changes):
    settings = dict(moe_router_topk=K, cluster_size=None, common_size=None, info={}) | changes
    return discover_by_knock_out(sums, removals(L, E, K, None, 1), counted, NAMES, **settings)


@pytest.fixture(scope="module")
def counted():
    unlabelled = torch.ones(2, L, E, dtype=torch.int64)
    for layer, inside in enumerate(COMMON):
        unlabelled[:, layer, inside] = 9
    halves = [routes_without_a_trace(seed) for seed in (1, 2)]
    return ProbeCounts(halves, [halves[0] + halves[1]] * 19, unlabelled)


def test_knock_out_finds_planted_experts_where_lift_fails(counted):
    found = mapped(losses(planted=True), counted)
    assert found.skill_map.skills == dict(zip(NAMES, PLANTED, strict=True))
    assert found.skill_map.common == COMMON and found.warning is None
    info = found.skill_map.info
    assert info["stability"]["jaccard"] == 1 and info["cluster_size"] == info["common_size"] == 2
    # Own experts: 1 nat beyond noise of 0.02 / sqrt(8 of a mean); the others' experts: none.
    for row in found.rows.values():
        assert row["own"] == pytest.approx(1, abs=0.05)
        assert row["others"] == pytest.approx(0, abs=0.05)
    assert info["selective"] > 0.8 > 0.1 > max(info["selective_shuffled"])
    assert abs(info["lift_rank_correlation"]) < 0.35  # of 48 cells: standard error 0.15
    halves = counted.halves
    with pytest.raises(RLError, match=r"no expert of 2 x 8 has a lift of 1.2 "):
        discover_by_lift(
            halves, [], NAMES, moe_router_topk=K, cluster_size=2, min_lift=1.2, info={}
        )
    overlapping = discover_by_lift(
        halves, counted.shuffled, NAMES, moe_router_topk=K, cluster_size=2, min_lift=1.001, info={}
    )
    assert overlapping.warning is not None
    assert overlapping.skill_map.skills != found.skill_map.skills


def test_experts_that_all_skills_miss_alike_are_chance(counted):
    found = mapped(losses(planted=False), counted)
    assert found.warning.startswith("the clusters are no better than chance")
    assert "\n" not in found.warning


def test_halves_that_agree_are_not_enough(counted):
    """The same effects in both halves, but no more of the skills than with shuffled labels."""
    sums = losses(planted=False)
    sums.nats_PHJS[:, 1] = sums.nats_PHJS[:, 0]
    sums.nats_PHJS[:, :, 1:] = sums.nats_PHJS[:, :, :1]
    warning = mapped(sums, counted).warning
    assert "with the skills shuffled among the rows they are as selective" in warning


def test_a_skill_without_right_spans_has_no_cluster(counted):
    sums = losses(planted=True)
    sums.nats_PHJS[..., 1], sums.tokens_HJS[..., 1] = 0, 0
    found = mapped(sums, counted)
    assert found.skill_map.names == ["a", "c"]
    assert found.skill_map.info["without_cluster"] == ["b"]
    assert found.rows["b"]["experts"] == 0 and found.score_SLE[1].abs().max() == 0
    assert found.skill_map.skills["a"][0] == [2, 5]


def test_a_loss_that_is_not_finite_makes_no_map(counted):
    sums = losses(planted=True)
    sums.nats_PHJS[3, 0, 0, 0] = torch.nan
    with pytest.raises(RLError, match="the loss of 1 of 17 passes is not finite"):
        mapped(sums, counted)

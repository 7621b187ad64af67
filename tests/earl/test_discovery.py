"""Lift, information and stability on routes whose truth is known."""

import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch

from megatron_mm.earl.metrics import information_pairs
from megatron_mm.earl.route_counts import (
    choose_clusters,
    count_routes,
    lift,
    lifts,
    mutual_information,
    shuffled_skills,
)
from megatron_mm.earl.stability import (
    Stability,
    correlation,
    own_and_others_fall,
    stability,
    stability_warning,
)
from megatron_mm.errors import RLError

E, S, V, L, K = 8, 4, 12, 2, 2


def routes_of(kind, positions, seed):
    """Returns routes, skills and tokens. "skill": expert 2s or 2s + 1 most of the time; "token":
    experts follow the token, and skills prefer tokens of their own; "noise": neither."""
    rng = random.Random(seed)
    routes, skills, tokens = [], [], []
    for _ in range(positions):
        skill = rng.randrange(S)
        # Each skill has favourite tokens but meets all of them.
        token = rng.choice([3 * skill, 3 * skill + 1, rng.randrange(V)])
        layers = []
        for layer in range(L):
            pull = {"skill": 2 * skill + layer, "token": token % E, "noise": -1}[kind]
            weights = [8.0 if e in (pull, (pull + 1) % E) and pull >= 0 else 1.0 for e in range(E)]
            first = rng.choices(range(E), weights)[0]
            weights[first] = 0.0
            layers.append([first, rng.choices(range(E), weights)[0]])
        routes.append(layers)
        skills.append(skill)
        tokens.append(token)
    return torch.tensor(routes, dtype=torch.int16), torch.tensor(skills), torch.tensor(tokens)


def counted(kind, positions=6000, seed=0):
    return count_routes(*routes_of(kind, positions, seed), E, S, V)


def dense_of(counts):
    """Returns the counts of a layer as a table [E, S, V']."""
    dense = torch.zeros(counts.sizes, dtype=torch.float64)
    dense[counts.expert_C, counts.skill_C, counts.token_C] = counts.count_C
    return dense


def halves(kind, given_token):
    """Returns the clusters of two halves of a probe."""
    return [
        choose_clusters(lifts(counted(kind, 3000, seed), given_token), 2, 1.05) for seed in (1, 2)
    ]


def test_counts_are_those_of_a_loop_and_add_up():
    routes, skill, token = routes_of("skill", 300, 3)
    skill[::7] = -1
    whole = count_routes(routes, skill, token, E, S, V)
    dense = torch.zeros(L, E, S, V)
    for t, layer, slot in itertools.product(range(300), range(L), range(K)):
        if skill[t] >= 0:
            dense[layer, int(routes[t, layer, slot]), skill[t], token[t]] += 1
    for layer in range(L):
        seen = dense[layer].sum((0, 1)) > 0
        assert torch.equal(dense_of(whole.layer(layer)), dense[layer][..., seen].double())
    assert torch.equal(whole.sums(), dense.sum(3).double())
    parts = [
        count_routes(routes[i], skill[i], token[i], E, S, V) for i in (slice(90), slice(90, 300))
    ]
    both = parts[0] + parts[1]
    assert torch.equal(both.cells, whole.cells) and torch.equal(both.counts, whole.counts)


def test_what_is_beyond_the_sizes_is_not_counted_as_another():
    routes, skill, token = routes_of("noise", 10, 0)
    for what, sizes in (("expert", (4, S, V)), ("skill", (E, 2, V)), ("token", (E, S, 5))):
        with pytest.raises(RLError, match=f"routes name {what} "):
            count_routes(routes, skill, token, *sizes)
    with pytest.raises(RLError, match="routes name expert -1, there are 0 to 7"):
        count_routes(routes.where(routes > 0, -1), skill, token, E, S, V)


def test_counts_of_another_model_do_not_add():
    other = count_routes(*routes_of("noise", 10, 0), E + 1, S, V)
    with pytest.raises(RLError, match=r"\(2, 8, 4, 12\) and \(2, 9, 4, 12\)"):
        counted("noise", 10) + other


def test_lift_equals_its_definition():
    layer = counted("skill", 500).layer(0)
    found, pooled = lift(layer, prior=2.0), lift(layer, given_token=False, prior=2.0)
    counts = dense_of(layer)
    for e, s in itertools.product(range(E), range(S)):
        expected = 0.0
        for v in range(counts.shape[2]):
            total = float(counts[:, :, v].sum())
            expected += float(counts[e, :, v].sum() * counts[:, s, v].sum()) / total
        value = (float(counts[e, s].sum()) + 2) / (expected + 2)
        assert float(found[e, s]) == pytest.approx(value, rel=1e-12)
        expected = float(counts[e].sum() * counts[:, s].sum() / counts.sum())
        value = (float(counts[e, s].sum()) + 2) / (expected + 2)
        assert float(pooled[e, s]) == pytest.approx(value, rel=1e-12)


def test_experts_of_a_skill_are_found():
    clusters = choose_clusters(lifts(counted("skill")), 2)
    # Layer 0 pulls to 2s and 2s + 1, layer 1 one further.
    expected = [
        [sorted([2 * s, 2 * s + 1]), sorted([2 * s + 1, (2 * s + 2) % E])] for s in range(S)
    ]
    assert clusters == expected


def test_clusters_hold_no_more_than_asked_and_none_below_the_lift():
    lift_LES = torch.tensor([[[2.0], [1.05], [1.4], [0.3]]])
    assert choose_clusters(lift_LES, 9) == [[[0, 2]]]
    assert choose_clusters(lift_LES, 1) == [[[0]]]
    assert choose_clusters(lift_LES, 2, min_lift=3.0) == [[[]]]


def test_experts_that_follow_the_token_have_no_lift_given_it():
    counts = counted("token")
    given, without = lifts(counts), lifts(counts, given_token=False)
    assert without.max() > 1.5
    assert given.log().abs().max() < 0.25
    assert choose_clusters(given, 2, 1.3) == [[[], []]] * S


def test_information_is_that_of_a_loop_and_goes_to_its_bias_by_chance():
    layer = counted("skill", 400).layer(1)
    counts = dense_of(layer)
    n = float(counts.sum())
    expected = 0.0
    for e, s, v in itertools.product(range(E), range(S), range(counts.shape[2])):
        c = float(counts[e, s, v])
        if c:
            pe, ps = float(counts[e, :, v].sum()), float(counts[:, s, v].sum())
            expected += c / n * math.log(c * float(counts[:, :, v].sum()) / (pe * ps))
    seen = [((counts > 0).any(axis).sum(0) - 1).clamp(min=0) for axis in (1, 0)]
    free = float((seen[0] * seen[1]).sum()) / (2 * n)
    assert mutual_information(layer) == pytest.approx((expected, free), rel=1e-12)
    served, bias = mutual_information(counted("skill").layer(0))
    assert served > 10 * bias
    for kind in ("token", "noise"):
        found, bias = mutual_information(counted(kind, 20000).layer(0))
        # The k experts of a position differ from each other, which makes chance a little smaller.
        assert 0.5 * bias < found < 1.3 * bias
    routes, skills, tokens = routes_of("noise", 3, 0)
    nothing = count_routes(routes, skills.fill_(-1), tokens, E, S, V)
    assert mutual_information(nothing.layer(0)) == (0.0, 0.0)


def test_skills_are_exchanged_within_a_token():
    _, skills, tokens = routes_of("skill", 600, 5)
    skills[::5] = -1
    found = shuffled_skills(skills, tokens, seed=1)
    assert torch.equal(found < 0, skills < 0) and not torch.equal(found, skills)
    for token in range(V):
        here = tokens == token
        assert sorted(found[here].tolist()) == sorted(skills[here].tolist())
    assert torch.equal(found, shuffled_skills(skills, tokens, seed=1))


@pytest.mark.parametrize("positions", [300, 8000])
def test_information_beyond_chance_is_none_where_routes_know_no_skill(positions):
    """With few positions the formula of Miller and Madow leaves more than the effect itself."""
    sizes = L, K, (E, S, V)
    beyond = {}
    for kind in ("token", "noise", "skill"):
        routes, skills, tokens = routes_of(kind, positions, 1)
        # A completion's first position is not counted, and its last token not seen by a router.
        completion = SimpleNamespace(routes_GLk=routes, tokens_G=tokens.roll(-1))
        spans = [(n, n + 1, int(skill), True) for n, skill in enumerate(skills)]
        (pair,) = information_pairs([completion], [spans], *sizes).values()
        assert pair[1] == L * (positions - 1)
        beyond[kind] = pair[0] / pair[1]
    assert beyond["skill"] > 0.15
    # Two estimates of a chance of about 0.1 (300 positions), each of hundreds of counts.
    assert abs(beyond["token"]) < 0.02 > abs(beyond["noise"])


def test_stability_tells_skill_from_token_from_noise():
    def of(kind):
        return [stability(*halves(kind, given), E) for given in (True, False)]

    given, without = of("skill")
    assert given.jaccard > 0.9 > 0.3 > given.chance and given.z > 5
    assert stability_warning(given, without) is None
    # Halves may agree because layers and positions do; shuffled rows would then tell as much.
    assert stability_warning(given, without, 0.2, [0.1, 0.15]) is None
    warning = stability_warning(given, without, 0.2, [0.1, 0.25])
    assert "with the skills shuffled among the rows" in warning and "up to 0.2500" in warning
    given, without = of("token")
    assert without.above_chance and not given.above_chance
    warning = stability_warning(given, without)
    assert warning.startswith("the clusters only re-discover the token") and "\n" not in warning
    given, without = of("noise")
    warning = stability_warning(given, without)
    assert warning.startswith("the clusters are no better than chance") and "z " in warning


def test_chance_is_that_of_random_clusters():
    """Expected Jaccard and the spread of z, against drawing."""
    rng = random.Random(0)
    sizes = [(2, 2), (3, 1), (4, 3), (2, 5), (0, 2)]
    found = []
    for _ in range(4000):
        one = [[rng.sample(range(E), a) for a, _ in sizes]]
        other = [[rng.sample(range(E), b) for _, b in sizes]]
        found.append(stability(one, other, E))
    chance = found[0].chance
    assert sum(f.jaccard for f in found) / 4000 == pytest.approx(chance, abs=0.005)
    z = torch.tensor([f.z for f in found])
    assert float(z.mean()) == pytest.approx(0, abs=0.06)
    assert float(z.std()) == pytest.approx(1, abs=0.06)
    assert stability([[[]]], [[[]]], E) == Stability(0.0, 0.0, 0.0, 0)
    assert stability([[[*range(E)]]], [[[*range(E)]]], E).z == 0


def test_correlation_of_lifts():
    one = torch.tensor([1.0, 2.0, 4.0])
    assert correlation(one, one**2) == pytest.approx(1)
    assert correlation(one, 1 / one) == pytest.approx(-1)
    assert correlation(one, torch.ones(3)) == 0


def test_the_falls_of_own_and_other_skills_are_told_apart():
    accuracy = torch.tensor([0.9, 0.8, 0.7]).double()
    without = torch.tensor([[0.3, 0.8, 0.6], [0.8, 0.7, 0.6], [0.9, 0.8, 0.7]]).double()
    own, others = own_and_others_fall(accuracy, without)
    assert own.tolist() == pytest.approx([0.6, 0.1, 0.0], abs=1e-6)
    assert others.tolist() == pytest.approx([0.05, 0.1, 0.0], abs=1e-6)

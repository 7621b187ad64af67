"""Maps drawn at random: exclusive, balanced, and made with one pass over the probe."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_mm.earl.count_probe import ProbeCounts
from megatron_mm.earl.discovery import AtRandom
from megatron_mm.earl.probe import Probe
from megatron_mm.earl.random_map import draw_map
from megatron_mm.earl.route_counts import count_routes
from megatron_mm.earl.skill_map import load_skill_map
from megatron_mm.errors import RLError
from support.planted import discovered, plant, planted_run, write_rows
from support.trainers import LAYOUTS

L, E, K = 3, 12, 2
NAMES = ["a", "b", "c", "d"]
COMMON = [[0, 11], [3, 4], [5, 9]]


@pytest.fixture(scope="module")
def counted():
    generator = torch.Generator().manual_seed(1)
    routes = torch.rand(400, L, E, generator=generator).argsort(-1)[..., :K].short()
    skill, token = (torch.randint(0, n, (400,), generator=generator) for n in (4, 7))
    halves = [
        count_routes(routes[half::2], skill[half::2], token[half::2], E, len(NAMES), 7)
        for half in (0, 1)
    ]
    unlabelled = torch.ones(2, L, E, dtype=torch.int64)
    for layer, inside in enumerate(COMMON):
        unlabelled[:, layer, inside] = 9
    return ProbeCounts(halves, [], unlabelled)


def drawn(counted, **changes):
    given = {"moe_router_topk": K, "cluster_size": None, "common_size": None, "seed": 1}
    return draw_map(counted, NAMES, info={}, **given | changes)


def test_clusters_are_exclusive_balanced_and_drawn_by_the_seed(counted):
    found = drawn(counted).skill_map
    assert found.common == COMMON  # what tokens without a skill use most
    for layer in range(L):
        clusters = [found.skills[name][layer] for name in NAMES]
        assert {len(cluster) for cluster in clusters} == {2}
        everyone = [*itertools.chain(*clusters), *COMMON[layer]]
        assert len(everyone) == len({*everyone}) == 10
    assert found == drawn(counted).skill_map
    assert found.skills != drawn(counted, seed=2).skill_map.skills
    assert found.info["seed"] == 1 and found.info["use"].keys() == {*NAMES}
    smaller = drawn(counted, cluster_size=1, common_size=3).skill_map
    assert {len(c) for of in smaller.skills.values() for c in of} == {1}
    assert {len(c) for c in smaller.common} == {3}


def test_every_expert_is_as_likely(counted):
    """10 experts that are not common, 2 of them a skill's: each in a fifth of the draws."""
    maps = [drawn(counted, seed=seed).skill_map for seed in range(400)]
    share_SLE = torch.stack([one.membership() for one in maps]).double().mean(0)
    for layer, inside in enumerate(COMMON):
        others = [expert for expert in range(E) if expert not in inside]
        assert share_SLE[:, layer, inside].max() == 0
        # A standard error is sqrt(0.2 * 0.8 / 400) = 0.02; 120 shares stay within 4 of them.
        assert (share_SLE[:, layer, others] - 0.2).abs().max() < 0.08


def test_too_many_skills_are_one_line(counted):
    with pytest.raises(RLError, match="4 skills x 3 experts of their own .* are 14, a layer has"):
        drawn(counted, cluster_size=3)


@pytest.fixture(scope="module")
def place(ranks, scenes, tmp_path_factory):
    """A folder with a model and rows of two skills."""
    folder = tmp_path_factory.mktemp("drawn")
    rows = str(write_rows(folder / "rows.jsonl", 60, seed=1))
    ranks(1, plant, planted_run(scenes), rows, str(folder / "model"))
    return folder


def find(ranks, place, scenes, layout):
    """Returns what every rank found, and the file of the map."""
    size, sizes = LAYOUTS[layout]
    out = place / f"{layout.replace(' ', '_')}.json"
    probe = Probe(str(place / "rows.jsonl"), batch_size=7)
    model = planted_run(scenes, **sizes), str(place / "model")
    return ranks(size, discovered, *model, probe, str(out), AtRandom()), out


def test_a_drawn_map_serves_and_ranks_agree_on_it(ranks, place, scenes):
    ((expected, skills, warning),), out = find(ranks, place, scenes, "one rank")
    assert skills == ["alpha", "beta"] and warning is None
    stored = load_skill_map(out, 2, 8, 2, exclusive=True)
    assert stored.skills == expected.skills and stored.info["method"] == "random"
    assert not out.with_suffix(".knock-out.pt").exists()  # no expert was removed
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for skill_map, _, _ in find(ranks, place, scenes, "EP2")[0]:
        assert (skill_map.skills, skill_map.common) == (expected.skills, expected.common)

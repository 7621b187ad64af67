"""Skill maps: reading and writing, rejected files, and the shuffled control."""

import json

import pytest
import torch

from megatron_mm.earl.skill_map import SkillMap, load_skill_map, save_skill_map, shuffled
from megatron_mm.errors import RLError

SKILLS = {"ocr": [[0, 3], [1], []], "count": [[3], [], [2, 5, 6]]}


@pytest.fixture
def skill_map():
    return SkillMap(3, 8, 2, SKILLS, {"jaccard": 0.7})


def test_a_map_is_read_back_and_readable(skill_map, tmp_path):
    path = tmp_path / "map.json"
    save_skill_map(skill_map, path)
    assert load_skill_map(path, 3, 8, 2) == skill_map
    assert '    "ocr": [[0, 3], [1], []],' in path.read_text().splitlines()
    assert [p.name for p in tmp_path.iterdir()] == ["map.json"]


def test_membership_and_ids(skill_map):
    member = skill_map.membership()
    assert member.shape == (2, 3, 8) and member[0, 0].nonzero().flatten().tolist() == [0, 3]
    assert not member[0, 2].any() and int(member.sum()) == 7
    labels = ["count", None, "ocr"]
    assert skill_map.skill_ids(labels, "a.jsonl:3") == ([1, -1, 0], 0)
    with pytest.raises(RLError) as caught:
        skill_map.skill_ids(["ocr", "spatial"], "a.jsonl:3")
    assert str(caught.value) == (
        "a.jsonl:3: skill 'spatial' has no cluster among the 2 of the skill map (ocr, count); "
        "discover it, or relabel the spans"
    )
    assert skill_map.skill_ids(["ocr", "spatial"], "", "skip") == ([0, -1], 1)


def test_the_shuffled_map_keeps_sizes_and_overlaps(skill_map):
    found = [shuffled(skill_map, seed) for seed in range(20)]
    member = skill_map.membership()
    for control in found:
        other = control.membership()
        assert torch.equal(other.sum(2), member.sum(2))
        assert torch.equal((other[0] & other[1]).sum(1), (member[0] & member[1]).sum(1))
    assert found[0] == shuffled(skill_map, 0) and found[0].info["shuffled_with_seed"] == 0
    assert len({str(control.skills) for control in found}) > 15


COMMON = [[1, 7], [0], [0, 7]]
EXCLUSIVE = {"ocr": [[0, 3], [1], [3]], "count": [[4], [2, 5], [2, 5, 6]]}


def test_a_map_with_a_common_cluster_is_read_back(tmp_path):
    path = tmp_path / "map.json"
    skill_map = SkillMap(3, 8, 2, EXCLUSIVE, {}, COMMON)
    save_skill_map(skill_map, path)
    assert load_skill_map(path, 3, 8, 2, exclusive=True) == skill_map
    clusters = skill_map.clusters()
    assert clusters.shape == (3, 3, 8) and torch.equal(clusters[:2], skill_map.membership())
    assert clusters[-1].nonzero().tolist() == [[0, 1], [0, 7], [1, 0], [2, 0], [2, 7]]
    control = shuffled(skill_map, 3)
    assert control.common == COMMON  # the control is about skills alone
    assert torch.equal(control.clusters().sum(2), clusters.sum(2))
    for seed in range(20):  # nothing stays where something else can stand
        stays = (shuffled(skill_map, seed).membership() & skill_map.membership()).sum(2)
        assert not stays.any()


def test_a_map_without_a_common_cluster_is_not_exclusive(skill_map, tmp_path):
    path = tmp_path / "map.json"
    save_skill_map(skill_map, path)
    with pytest.raises(RLError, match="map 1', exclusive clusters need 'megatron_mm skill map 2'"):
        load_skill_map(path, 3, 8, 2, exclusive=True)
    with pytest.raises(RLError, match="no common cluster"):
        skill_map.clusters()


def held(**changes):
    return {
        "format": "megatron_mm skill map 1",
        "num_layers": 3,
        "num_experts": 8,
        "moe_router_topk": 2,
        "skills": SKILLS,
    } | changes


def both(**changes):
    return held(format="megatron_mm skill map 2", skills=EXCLUSIVE, common=COMMON) | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ([], "format is 'list'; this version reads 'megatron_mm skill map 2'"),
        (held(format="megatron_mm skill map 2"), "'common' is missing"),
        (both(common=3), "'common' is no list"),
        (both(common=[[1], [0]]), "the common cluster has 2 layers, num_layers is 3"),
        (both(common=[[1], [0], [9]]), "the common cluster, layer 2: expert 9 of 8"),
        (
            both(common=[[1], [0], [5]]),
            "layer 2: expert 5 is in the common cluster and in skill 'count'",
        ),
        (
            both(skills=EXCLUSIVE | {"ocr": [[4], [], []]}),
            "layer 0: expert 4 is in skill 'ocr' and in skill 'count'",
        ),
        (held(format="2"), "format is '2'"),
        (held(num_layers=4), "num_layers is 4, the model's is 3; discover the experts of this"),
        (held(num_experts=16), "num_experts is 16, the model's is 8"),
        (held(moe_router_topk=10), "moe_router_topk is 10, the model's is 2"),
        ({k: v for k, v in held().items() if k != "skills"}, "'skills' is missing"),
        (held(skills=[]), "'skills' is no object"),
        (held(skills={}), "a skill map with 0 skills"),
        (held(skills={"ocr": [[0], [1]]}), "skill 'ocr' has 2 layers, num_layers is 3"),
        (held(skills={"ocr": [[0], [8], []]}), "'ocr', layer 1: expert 8 of 8; use 0 to 7"),
        (held(skills={"ocr": [[0], [True], []]}), "expert True of 8"),
        (held(skills={"ocr": [[0, 0], [], []]}), "layer 0: an expert is named twice"),
        (held(skills={"ocr": [[], [], []]}), "skill 'ocr' has 0 experts in all 3 layers"),
        (held(skills={"ocr": [0, 1, 2]}), "no list of layers, each a list of experts"),
    ],
)
def test_what_is_no_map_of_this_model_is_refused_in_one_line(content, message, tmp_path):
    path = tmp_path / "map.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(RLError) as caught:
        load_skill_map(path, 3, 8, 2)
    text = str(caught.value)
    assert text.startswith(f"skill map {path}: ") and message in text and "\n" not in text


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(RLError, match="none.json: No such file or directory"):
        load_skill_map(tmp_path / "none.json", 3, 8, 2)

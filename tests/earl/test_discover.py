"""Planted routing is found, on every layout; chance is called chance."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from megatron.core import parallel_state

from megatron_mm.config import RunConfig, preset
from megatron_mm.earl.discovery import ByLift, forbid_clusters
from megatron_mm.earl.probe import Probe
from megatron_mm.earl.skill_map import SkillMap, load_skill_map
from megatron_mm.earl.stability import MIN_Z
from megatron_mm.errors import RLError
from support.planted import PLANTED, discovered, plant, planted_run, write_rows
from support.tools import load_tool
from support.trainers import LAYOUTS


@pytest.fixture(scope="module")
def place(ranks, scenes, tmp_path_factory):
    """A folder with a planted model and rows."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "images").symlink_to(scenes / "images")
    write_rows(folder / "rows.jsonl", 200, seed=1)
    write_rows(folder / "noise.jsonl", 200, seed=2, honest=False)
    rows = str(folder / "rows.jsonl")
    ranks(1, plant, planted_run(scenes), rows, str(folder / "model"))
    return folder


def find(ranks, place, scenes, layout="one rank", rows="rows.jsonl", min_lift=1.2, **settings):
    """Returns what every rank found, and the file of the map."""
    size, sizes = LAYOUTS[layout]
    trained = settings.pop("trained", True)
    probe = Probe(str(place / rows), batch_size=7, **settings)
    checkpoint = str(place / "model") if trained else None
    out = str(place / f"{layout} {rows}.json".replace(" ", "_"))
    run = planted_run(scenes, **sizes)
    return ranks(size, discovered, run, checkpoint, probe, out, ByLift(2, min_lift)), Path(out)


@pytest.fixture(scope="module")
def alone(ranks, place, scenes):
    return find(ranks, place, scenes)


def test_planted_experts_are_found(alone):
    (found,), out = alone
    skill_map, skills, warning = found
    assert skills == ["alpha", "beta"] and warning is None
    assert skill_map.skills == {skill: [experts] * 2 for skill, experts in PLANTED.items()}
    info = skill_map.info
    assert info["stability"]["jaccard"] == 1.0 and info["samples"] == 200
    # Six pairs of digits: 12 tokens, each predicted by the position before it.
    assert sum(info["positions"].values()) == 200 * 12
    for nats, chance in zip(
        info["mutual_information"], info["mutual_information_by_chance"], strict=True
    ):
        assert nats > 5 * chance
    assert min(info["mutual_information"]) > 5 * max(info["mutual_information_shuffled"])
    assert load_skill_map(out, 2, 8, 2) == skill_map
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_map_of_another_model_is_refused(alone):
    with pytest.raises(RLError, match="num_layers is 2, the model's is 3; discover the experts"):
        load_skill_map(alone[1], 3, 8, 2)


@pytest.mark.parametrize("layout", ["TP2", "PP2", "EP2", "DP2", "CP2", "PP2xVPP2", "TP2xPP2"])
def test_every_layout_finds_the_same(ranks, place, scenes, alone, layout):
    found, out = find(ranks, place, scenes, layout)
    expected = alone[0][0][0]
    for skill_map, _, warning in found:
        assert skill_map.skills == expected.skills and warning is None
        assert skill_map.info["positions"] == expected.info["positions"]
        # Rounding may send a near tie elsewhere: some of 2400 positions.
        for key in ("mutual_information", "mutual_information_by_chance"):
            assert skill_map.info[key] == pytest.approx(expected.info[key], rel=0.02)
    assert load_skill_map(out, 2, 8, 2) == found[0][0]


@pytest.mark.parametrize("trained", [True, False])
def test_chance_is_called_chance(ranks, place, scenes, trained):
    """Skills drawn without regard to the answer, in the planted and in a new model. Clusters are
    found: 2400 positions in 16 x 2 cells always leave some with a lift of 1.01.

    In the planted model all layers route alike, by what the answer is: clusters of the two halves
    may agree beyond what independent ones would, and then only shuffling tells.
    """
    settings = {"rows": "noise.jsonl", "min_lift": 1.01, "trained": trained}
    ((skill_map, _, warning),), _ = find(ranks, place, scenes, **settings)
    assert warning.startswith("the clusters are no better than chance") and "\n" not in warning
    assert ("shuffled" in warning) == (skill_map.info["stability"]["z"] > MIN_Z)


def test_a_part_of_the_rows_is_drawn_from_the_seed(ranks, place, scenes):
    found = [find(ranks, place, scenes, samples=20, seed=seed)[0][0][0] for seed in (1, 1, 2)]
    assert found[0] == found[1] and found[0].info["positions"] != found[2].info["positions"]
    assert all(sum(one.info["positions"].values()) == 20 * 12 for one in found)


@pytest.fixture
def tool(capsys):
    """`tool(*flags)` in this process: (status, stdout, stderr)."""
    module = load_tool("discover_experts")

    def call(*flags):
        capsys.readouterr()
        status = module.main([str(flag) for flag in flags])
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        return status, *capsys.readouterr()

    return call


def test_the_tool_runs_the_causal_test(tool, place, scenes, tmp_path):
    (tmp_path / "images").symlink_to(scenes / "images")
    valid = write_rows(tmp_path / "valid.jsonl", 6, seed=3)
    out = tmp_path / "new" / "map.json"
    status, printed, errors = tool(
        "--checkpoint", place / "model", "--data", place / "rows.jsonl", "--out", out,
        "--method", "lift", "--samples", 80, "--min-lift", 1.2, "--selectivity", valid,
        "--max-new-tokens", 3,
    )  # fmt: skip
    assert status == 0, errors
    lines = printed.splitlines()
    assert lines[0].split()[-3:] == ["accuracy", "own", "others"]
    assert lines[1].startswith("alpha ") and lines[2].startswith("beta ")
    assert lines[-1] == f"written: {out}, {out.with_suffix('.png')}"
    info = load_skill_map(out, 2, 8, 2).info
    assert info["causal_test"]["without"].keys() == {"alpha", "beta"}
    assert info["causal_test"]["accuracy"].keys() == {"alpha", "beta"}
    assert info["checkpoint"].endswith("iter_0000001")

    # Measured on the same rows, the map is what it was; on others its clusters stay.
    again = tmp_path / "again.json"
    for samples in (80, 40):
        status, told, errors = tool(
            "--checkpoint", place / "model", "--data", place / "rows.jsonl", "--out", again,
            "--samples", samples, "--skill-map", out,
        )  # fmt: skip
        assert status == 0, errors
        measured = load_skill_map(again, 2, 8, 2)
        assert measured.skills == load_skill_map(out, 2, 8, 2).skills
        same = measured.info["mutual_information"] == info["mutual_information"]
        assert same == (samples == 80)
        words = [line.split()[:6] for line in told.splitlines()[1:3]]
        assert (words == [line.split()[:6] for line in lines[1:3]]) == (samples == 80)


def test_a_cluster_of_nearly_all_experts_cannot_be_forbidden():
    skill_map = SkillMap(2, 8, 2, {"alpha": [[], [0, 1, 2, 3, 4, 5, 6]]})
    with pytest.raises(RLError, match=r"7 of 8 experts cannot be forbidden, .*-size 6 or less"):
        forbid_clusters(SimpleNamespace(run=RunConfig(model=preset("tiny"))), None, skill_map)


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"--checkpoint": "nowhere"}, 1, "cannot load nowhere"),
        ({"--data": "nowhere.jsonl"}, 1, "nowhere.jsonl: there is no such file"),
        ({"--data": "bad"}, 1, "bad.jsonl:2: span 1 of 1 has no text 'skill'"),
        ({"--data": "plain"}, 1, "0 of 2 rows have labels; rows need 'spans'"),
        ({"--data": "question"}, 1, "the last of 1 messages is a user turn; skills are labelled"),
        ({"--labeller": "paragraphs"}, 1, "labeller 'paragraphs' is not built in"),
        (
            {"--method": "lift", "--min-lift": "50"},
            1,
            "no expert of 2 x 8 has a lift of 50 for any of 2 skills",
        ),
        ({"--method": "lift", "--min-lift": "0.5"}, 2, "--min-lift is 0.5; allowed: more than 1"),
        ({"--skill-map": "nowhere.json"}, 1, "skill map nowhere.json: No such file"),
        ({"--samples": "1"}, 2, "--samples is 1; allowed: 2 or more"),
        ({"--lr": "1"}, 2, "--lr is not for discovering"),
        ({"--out": "map.txt"}, 2, "--out is map.txt; allowed: a name that ends in .json"),
        ({"--tensor-model-parallel-size": "2"}, 2, "world_size"),
        ({"--selectivity": "other"}, 1, "no row is of one of the map's 2 skills (alpha, beta)"),
    ],
)
def test_wrong_use_is_one_line(tool, place, tmp_path, change, status, words):
    ask = {"role": "user", "content": "Read all cells?"}
    tell = {"role": "assistant", "content": "13"}
    good = {"messages": [ask, tell], "spans": [{"text": "13", "skill": "alpha"}]}
    for name, rows in {
        "bad": [good, {"messages": [ask, tell], "spans": [{"text": "13"}]}],
        "plain": [{"messages": [ask, tell]}] * 2,
        "question": [{"messages": [ask], "skill": "alpha", "ground_truth": "1"}] * 2,
        "other": [{"messages": [ask, tell], "skill": "gamma"}],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        change = {k: tmp_path / f"{name}.jsonl" if v == name else v for k, v in change.items()}
    flags = {"--checkpoint": place / "model", "--data": place / "rows.jsonl"}
    flags |= {"--out": tmp_path / "map.json", "--samples": 20, "--max-new-tokens": 1} | change
    found, _, errors = tool(*(word for pair in flags.items() for word in pair))
    assert found == status, errors
    assert errors.startswith("error: ") and errors.count("\n") == 1 and words in errors

"""Knock-out on a model whose experts matter where routes tell nothing, on every layout."""

from __future__ import annotations

import json

import pytest
import torch
from megatron.core import parallel_state

from megatron_mm.earl import knock_out
from megatron_mm.earl.discovery import ByKnockOut, ByLift
from megatron_mm.earl.probe import Probe
from megatron_mm.earl.skill_map import load_skill_map
from support.planted import (
    CAUSES,
    discovered,
    plant_causes,
    planted_run,
    slow_effects,
    write_rows,
)
from support.tools import load_tool
from support.trainers import LAYOUTS


@pytest.fixture(scope="module")
def place(ranks, scenes, tmp_path_factory):
    """A folder with a planted model and rows; one row of `some.jsonl` is not right."""
    folder = tmp_path_factory.mktemp("causes")
    (folder / "images").symlink_to(scenes / "images")
    write_rows(folder / "rows.jsonl", 60, seed=1)
    write_rows(folder / "noise.jsonl", 60, seed=2, honest=False)
    lines = write_rows(folder / "some.jsonl", 9, seed=3).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows[2]["spans"][0] |= {"text": "no", "value": "no"}
    (folder / "some.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    ranks(1, plant_causes, planted_run(scenes), str(folder / "rows.jsonl"), str(folder / "model"))
    return folder


def find(ranks, place, scenes, layout="one rank", rows="rows.jsonl", method=None, **settings):
    """Returns what every rank found."""
    size, sizes = LAYOUTS[layout]
    probe = Probe(str(place / rows), batch_size=7, **settings)
    out = str(place / f"{layout} {rows}.json".replace(" ", "_"))
    run = planted_run(scenes, **sizes)
    return ranks(size, discovered, run, str(place / "model"), probe, out, method or ByKnockOut())


def effects_of(skill_map):
    """Returns the effects [S, L, E] that a map keeps."""
    return torch.tensor(list(skill_map.info["knock_out"].values()), dtype=torch.float64)


@pytest.fixture(scope="module")
def alone(ranks, place, scenes):
    return find(ranks, place, scenes)[0]


def test_experts_that_matter_are_found_where_routes_tell_nothing(ranks, place, scenes, alone):
    skill_map, skills, warning = alone
    assert skills == ["alpha", "beta"] and warning is None, skill_map
    for skill, expert in CAUSES.items():
        assert expert in skill_map.skills[skill][1], skill_map
    everyone = [skill_map.common, *skill_map.skills.values()]
    for layer in range(2):
        inside = [expert for clusters in everyone for expert in clusters[layer]]
        assert len(inside) == len({*inside}) == 6  # k = 2 common ones, and 2 of each skill
    by_lift, _, _ = find(ranks, place, scenes, method=ByLift(2, 1.001))[0]
    found = {skill: by_lift.skills.get(skill, [[], []])[1] for skill in CAUSES}
    assert not all(expert in found[skill] for skill, expert in CAUSES.items()), by_lift


def test_effects_are_those_of_a_slow_computation(ranks, place, scenes):
    skill_map, _, _ = find(ranks, place, scenes, rows="some.jsonl")[0]
    rows = str(place / "some.jsonl")
    run, model = planted_run(scenes), str(place / "model")
    ((slow, counts),) = ranks(1, slow_effects, run, model, rows)
    # The map keeps five decimals; the losses are means of fp32 numbers of a few nats.
    assert (effects_of(skill_map) - slow).abs().max() < 2e-5
    assert float(slow.abs().max()) > 0.1
    # 12 tokens of each row; the row that is not right is labelled, but not measured.
    assert sum(skill_map.info["positions"].values()) == 9 * 12 == counts.sum() + 12


@pytest.mark.parametrize("layout", ["TP2xPP2", "EP2", "CP2"])
def test_every_layout_finds_the_same(ranks, place, scenes, alone, layout):
    expected = alone[0]
    for skill_map, _, warning in find(ranks, place, scenes, layout):
        assert skill_map.skills == expected.skills and skill_map.common == expected.common
        assert warning is None
        # Rounding may send a near tie elsewhere: some of 720 tokens, each of a few nats.
        assert (effects_of(skill_map) - effects_of(expected)).abs().max() < 0.02


def test_labels_without_regard_to_the_answer_are_called_chance(ranks, place, scenes):
    _, _, warning = find(ranks, place, scenes, rows="noise.jsonl")[0]
    assert warning.startswith("the clusters are no better than chance") and "\n" not in warning


@pytest.fixture
def tool(capsys):
    """`tool(*flags)` in this process: (status, stdout, stderr)."""
    module = load_tool("discover_experts")

    def call(*flags):
        capsys.readouterr()
        try:
            status = module.main([str(flag) for flag in flags])
        finally:
            if parallel_state.model_parallel_is_initialized():
                parallel_state.destroy_model_parallel()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        return status, *capsys.readouterr()

    return call


def test_an_interrupted_measurement_goes_on(tool, place, tmp_path, monkeypatch):
    flags = ["--checkpoint", place / "model", "--data", place / "rows.jsonl", "--samples", 24]
    flags += ["--batch-size", 6]
    whole, out = tmp_path / "whole.json", tmp_path / "map.json"
    status, _, errors = tool(*flags, "--out", whole)
    assert status == 0, errors

    monkeypatch.setattr(knock_out, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(knock_out, "BLOCK", 5)  # 17 passes: 4 blocks in each of 4 rounds
    save, saved = knock_out.Progress.save, []

    def stop(self, *args):
        save(self, *args)
        saved.append(args[:2])
        if len(saved) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(knock_out.Progress, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        tool(*flags, "--out", out)
    assert saved[-1] == (1, 10) and not out.exists()
    status, _, errors = tool(*flags, "--out", out)
    assert status == 0 and len(saved) == 16, errors
    assert out.read_text() == whole.read_text()

    # A finished measurement is not repeated, whatever the sizes of clusters.
    status, _, errors = tool(*flags, "--out", out, "--cluster-size", 1)
    assert status == 0 and len(saved) == 16, errors
    smaller = load_skill_map(out, 2, 8, 2, exclusive=True)
    assert {len(c) for clusters in smaller.skills.values() for c in clusters} == {1}
    # That of other rows is.
    flags[flags.index(24)] = 23
    status, _, errors = tool(*flags, "--out", out)
    assert status == 0 and len(saved) == 32, errors
    out.with_suffix(".knock-out.pt").write_bytes(b"nothing")
    status, _, errors = tool(*flags, "--out", out)
    assert status == 1 and "map.knock-out.pt holds no sums of a knock-out" in errors


def test_the_tool_runs_the_causal_test(tool, place, scenes, tmp_path):
    (tmp_path / "images").symlink_to(scenes / "images")
    valid = write_rows(tmp_path / "valid.jsonl", 6, seed=3)
    out = tmp_path / "new" / "map.json"
    flags = ["--checkpoint", place / "model", "--data", place / "rows.jsonl", "--samples", 16]
    asked = ["--selectivity", valid, "--max-new-tokens", 3]
    status, printed, errors = tool(*flags, "--out", out, *asked)
    assert status == 0, errors
    head, alpha, beta, halves, written = printed.splitlines()
    assert head.split()[-5:] == ["own", "others", "accuracy", "own", "others"]
    assert alpha.startswith("alpha ") and beta.startswith("beta ")
    assert halves.startswith("two halves agree: ")
    assert written == f"written: {out}, {out.with_suffix('.png')}"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    causal = load_skill_map(out, 2, 8, 2, exclusive=True).info["causal_test"]
    for skill, other in (("alpha", "beta"), ("beta", "alpha")):
        fall = {name: causal["accuracy"][name] - causal["without"][skill][name] for name in CAUSES}
        assert causal["own"][skill] == pytest.approx(fall[skill])
        assert causal["others"][skill] == pytest.approx(fall[other])
    # Without questions the same is measured, which is not repeated.
    kept = out.with_suffix(".knock-out.pt")
    before = kept.stat().st_mtime_ns
    status, _, errors = tool(*flags, "--out", out)
    assert status == 0 and kept.stat().st_mtime_ns == before, errors
    # A later state of the model is measured by the same clusters.
    again = tmp_path / "again.json"
    status, _, errors = tool(*flags, "--out", again, "--skill-map", out)
    assert status == 0, errors
    measured = load_skill_map(again, 2, 8, 2, exclusive=True)
    assert measured.skills == load_skill_map(out, 2, 8, 2).skills
    assert measured.info["measured"].keys() == {"alpha", "beta"}


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"--data": "many"}, 1, "7 skills x 1 experts of their own + 2 common ones are 9, a layer"),
        ({"--cluster-size": 4}, 1, "2 skills x 4 experts of their own + 2 common ones are 10"),
        ({"--data": "wrong"}, 1, "0 of 2 labelled spans in 2 rows are right; a knock-out"),
        ({"--passes": 9}, 1, "--passes is 9; 2 layers of 8 experts need 16"),
        ({"--min-lift": "1.2"}, 2, "--min-lift is not for knock-out; allowed: --cluster-size, "),
        ({"--method": "lift", "--passes": 9}, 2, "--passes is not for lift; allowed: "),
        ({"--method": "random", "--passes": 9}, 2, "--passes is not for random; allowed: "),
        ({"--common-size": 0}, 2, "--common-size is 0; allowed: 1 or more"),
        ({"--method": "gates"}, 2, "'gates'"),
    ],
)
def test_wrong_use_is_one_line(tool, place, tmp_path, change, status, words):
    ask, tell = {"role": "user", "content": "Read?"}, {"role": "assistant", "content": "13"}

    def row(skill, text):
        return {"messages": [ask, tell], "spans": [{"text": text, "skill": skill}]}

    for name, rows in {
        "many": [row(f"skill{n}", "13") for n in range(7)],
        "wrong": [row("alpha", "31")] * 2,
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        change = {k: tmp_path / f"{name}.jsonl" if v == name else v for k, v in change.items()}
    flags = {"--checkpoint": place / "model", "--data": place / "rows.jsonl"}
    flags |= {"--out": tmp_path / "map.json", "--samples": 8} | change
    found, _, errors = tool(*(word for pair in flags.items() for word in pair))
    assert found == status, errors
    assert errors.startswith("error: ") and errors.count("\n") == 1 and words in errors

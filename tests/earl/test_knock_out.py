"""Knock-out on a model whose experts matter where routes tell nothing, on every layout."""

from __future__ import annotations

import json

import pytest

from megatron_mm.earl.discovery import ByKnockOut
from megatron_mm.earl.probe import Probe
from support.planted import (
    CAUSES,
    discovered,
    plant_causes,
    planted_run,
    write_rows,
)
from support.trainers import LAYOUTS


@pytest.fixture(scope="module")
def place(ranks, scenes, tmp_path_factory):
    """A folder with a planted model and rows; the rows of `some.jsonl` are not all right."""
    folder = tmp_path_factory.mktemp("causes")
    write_rows(folder / "rows.jsonl", 80, seed=1)
    write_rows(folder / "noise.jsonl", 80, seed=2, honest=False)
    lines = write_rows(folder / "some.jsonl", 9, seed=3).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows[2]["spans"][0]["value"] = "no"
    (folder / "some.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    ranks(1, plant_causes, planted_run(scenes), str(folder / "rows.jsonl"), str(folder / "model"))
    return folder


def find(ranks, place, scenes, layout="one rank", rows="rows.jsonl", method=None, **settings):
    """Returns what every rank found."""
    size, sizes = LAYOUTS[layout]
    probe = Probe(str(place / rows), batch_size=7, **settings)
    out = str(place / f"{layout} {rows}.json".replace(" ", "_"))
    model = str(place / "model")
    run = planted_run(scenes, **sizes)
    return ranks(size, discovered, run, model, probe, out, method or ByKnockOut())


@pytest.fixture(scope="module")
def alone(ranks, place, scenes):
    return find(ranks, place, scenes)[0]


def test_experts_that_matter_are_found(alone):
    skill_map, skills, warning = alone
    assert skills == ["alpha", "beta"]
    Path("/tmp/dbg.json").write_text(
        json.dumps([skill_map.skills, skill_map.common, skill_map.info])
    )
    for skill, expert in CAUSES.items():
        assert expert in skill_map.skills[skill][1]

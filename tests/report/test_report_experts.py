"""Skill maps and prunings in the report."""

import json
import re
from pathlib import Path

import pytest

from megatron_mm.earl.skill_map import SkillMap, save_skill_map
from megatron_mm.report.page import main, write_report
from megatron_mm.report.page_experts import discovery, prunings, skill_maps

TRICK = "spatial & <script>alert(1)</script>"
KNOCK_OUT = {
    "ocr": [[0.0, 2.0, -0.5, 0.0], [0.0, 0.0, 0.0, 1.0]],
    TRICK: [[0.0, 0.1, 0.2, 0.0], [0.4, 0.0, 0.0, 0.0]],
}
CAUSAL = {
    "accuracy": {"ocr": 0.9, TRICK: 0.8, "count": 0.7},
    "without": {
        "ocr": {"ocr": 0.4, TRICK: 0.775, "count": 0.675},
        TRICK: {"ocr": 0.9, TRICK: 0.6, "count": 0.7},
    },
}
INFO = {
    "knock_out": KNOCK_OUT,
    "own_and_others": {"ocr": [1.25, 0.0625], TRICK: [0.5, 0.125]},
    "causal_test": CAUSAL,
    "warning": None,
}


def save_map(folder: Path, info: dict, common: list | None, name: str = "map.json") -> None:
    skills = {"ocr": [[1], [3]], TRICK: [[2], [0]]}
    save_skill_map(SkillMap(2, 4, 1, skills, info, common), folder / name)


def result(accuracy: float, n: int = 1200) -> dict:
    return {"accuracy": accuracy, "chance": 0.25, "n": n}


def record(kept: int, after: float, **changes) -> dict:
    return {
        "checkpoint": "runs/sft/iter_0000400",
        "skill_map": "map.json",
        "skills": [TRICK],
        "num_experts": 8,
        "kept": kept,
        "filled_by": "knock_out",
        "experts": [[*range(kept)]] * 2,
        "valid_data": "valid.jsonl",
        "before": {"ocr": result(0.9), f"{TRICK}/free": result(0.8)},
        "after": {"ocr": result(0.3), f"{TRICK}/free": result(after)},
    } | changes


def save_record(path: Path, found: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))


@pytest.fixture
def page(tmp_path) -> str:
    save_map(tmp_path, INFO, [[0], [1]])
    save_record(tmp_path / "four" / "pruning.json", record(4, 0.7))
    save_record(tmp_path / "two" / "pruning.json", record(2, 0.5))
    return write_report(tmp_path).read_text(encoding="utf-8")


def cells(page: str, first: str) -> list[list[str]]:
    """The rows of tables whose first cell is `first`."""
    rows = re.findall(r"<tr>(?:<td>.*?</td>)+</tr>", page)
    found = [re.findall(r"<td>(.*?)</td>", row) for row in rows]
    return [row for row in found if row[0] == first]


def test_a_map_shows_clusters_scores_and_what_removal_costs(page):
    assert "<h2>Experts found: map.json</h2>" in page
    (row,) = (row for row in cells(page, "ocr") if len(row) == 7)
    # Without ocr's cluster ocr loses 0.5; the others 0.025 each.
    assert row[1:] == ["1.250", "0.062", "90.0%", "40.0%", "0.500", "0.025"]
    assert page.count("Experts by skill, layer ") == 2
    assert "those of no skill are common" in page and "full at the skill" in page


def test_a_chart_has_a_row_for_each_skill_and_the_common_cluster():
    skill_map = {"num_layers": 2, "num_experts": 4, "common": [[0], [1]], "info": INFO}
    found = discovery("map", skill_map | {"skills": {"ocr": [[1], [3]], TRICK: [[2], [0]]}})
    charts = [chart["svg"] for chart in found["charts"]]
    # matplotlib draws each dot as a use of one marker: ocr's, the other skill's, the common one.
    assert [len(re.findall(r"<use [^>]*var\(--ink\)", svg)) for svg in charts] == [3, 3]
    assert all(">common</text>" in svg and "<script" not in svg for svg in charts)
    without = discovery("map", skill_map | {"common": None, "skills": {"ocr": [[1], [3]]}})
    assert not without["common"] and ">common</text>" not in without["charts"][0]["svg"]


def test_a_map_of_lift_is_shown_without_scores(tmp_path):
    save_map(tmp_path, {"warning": "the clusters are no better than <chance>"}, None, "lift.json")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<h2>Experts found: lift.json</h2>" in page and "no better than &lt;chance&gt;" in page
    assert "Colour:" not in page and "What is lost" not in page


def test_prunings_of_one_model_are_a_table_and_curves(page):
    assert page.count("<h2>Kept for ") == 1
    heads = re.findall(r"<th>(.*?)</th>", page)
    assert heads[-6:] == ["kind", "n", "chance", "2 experts", "4 experts", "8 experts"]
    name = "spatial &amp; &lt;script&gt;alert(1)&lt;/script&gt;/free"
    assert cells(page, name) == [[name, "1,200", "25.0%", "50.0%", "70.0%", "80.0%"]]
    assert cells(page, "ocr")[-1][3:] == ["30.0%", "30.0%", "90.0%"]
    # The task's own kind comes first.
    assert page.index(f"<td>{name}</td>") < page.index("<td>ocr</td><td>1,200</td>")
    assert page.count('against experts kept"') == 2 and "<script" not in page


def test_a_skill_whose_name_begins_another_is_not_the_tasks():
    results = {"ocr2": result(0.5), "ocr/free": result(0.5), "count": result(0.5)}
    one = record(2, 0.5) | {"skills": ["ocr"], "before": results, "after": results}
    assert [row[0] for row in prunings([one])[0]["rows"]] == ["ocr/free", "ocr2", "count"]


def test_prunings_of_other_models_and_tasks_stand_apart():
    found = prunings([record(2, 0.5), record(4, 0.7), record(2, 0.1, skills=["ocr"])])
    assert sorted(len(one["heads"]) for one in found) == [5, 6]
    apart = [record(2, 0.5), record(2, 0.5, checkpoint="runs/other/iter_0000001")]
    assert len(prunings(apart)) == 2


def test_a_pruning_without_questions_has_no_figures(tmp_path):
    bare = {key: value for key, value in record(4, 0.7).items() if key not in ("before", "after")}
    save_record(tmp_path / "pruning.json", bare | {"valid_data": None})
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "No questions were asked." in page and "experts kept" not in page


def test_other_files_are_no_maps(tmp_path, capsys):
    (tmp_path / "notes.json").write_text("not JSON")
    (tmp_path / "broken.json").write_text('{"format": "megatron_mm skill map 2", ')
    with pytest.raises(ValueError, match="broken.json: not JSON"):
        skill_maps(tmp_path)
    assert main([str(tmp_path)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1

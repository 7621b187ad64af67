"""The demo's table: two runs on the same questions, what was asked for and what was not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.digits import arms_table


def write_run(folder: Path, right: dict[str, int], hit_rate: float | None = None):
    """A finished run: of each kind of 100 questions, so many answered rightly."""
    folder.mkdir(parents=True)
    records = [
        {"index": 100 * k + i, "key": key, "score": float(i < count)}
        for k, (key, count) in enumerate(right.items())
        for i in range(100)
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    skills = {key: {"accuracy": count / 100, "n": 100} for key, count in right.items()}
    (folder / "results.json").write_text(json.dumps({"skills": skills, "iteration": 3}))
    steps = [{"iteration": 1, "train/grad_norm": 1.0}]
    if hit_rate is not None:
        steps = [
            {"iteration": i, "rollout/moe/hit_rate": hit_rate + 0.1 * (i > 0)} for i in range(11)
        ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))


def test_before_and_after_adds_to_the_results(tmp_path, capsys):
    write_run(tmp_path / "demo", {"ocr/free": 60, "ocr": 90, "count": 50})
    write_run(tmp_path / "demo" / "earl", {"ocr/free": 90, "ocr": 70, "count": 54}, hit_rate=0.3)
    arms_table.main(
        ["--before", str(tmp_path / "demo"), "--after", str(tmp_path / "demo" / "earl")]
    )
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["iteration"] == 3 and results["sft"].keys() == results["earl"].keys()
    found = results["difference"]
    assert found["reinforced questions"][0] == pytest.approx(0.3)
    assert found["all others"][0] == pytest.approx(-0.08)
    assert found["worst of the others"]["ocr"][0] == pytest.approx(-0.2)
    assert results["router"]["hit_rate"] == pytest.approx({"before": 0.3, "after": 0.4})
    said = capsys.readouterr().out
    assert "worst of the others, ocr: -0.200 [" in said and "all others: -0.080 [" in said
    with pytest.raises(SystemExit, match="has not ended"):
        arms_table.main(["--before", str(tmp_path), "--after", str(tmp_path)])

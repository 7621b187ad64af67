"""The comparison of arms: its configs, its table and its intervals, on runs written by hand."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest

from megatron_mm.config import load, validate

ROOT = Path(__file__).parents[1]


def tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # arms imports arms_table
    spec.loader.exec_module(module)
    return module


arms_table = tool("arms_table")
arms = tool("arms")


@pytest.mark.parametrize("arm", arms.ARMS)
def test_every_arm_is_a_run_on_two_ranks(arm):
    flags = ["--load", "x"] + (["--skill-map", "map.json"] if arm.startswith("earl") else [])
    run = load(str(arms.DIGITS / "arms" / f"{arm}.yaml"), flags)
    validate(run, 2)
    assert run.checkpoint.finetune and run.training.objective == (
        "sft" if arm == "sft_continued" else "grpo"
    )
    for memory in arms.MEMORIES.values():
        validate(load(str(arms.DIGITS / "arms" / f"{arm}.yaml"), [*flags, *memory]), 2)


def write_run(folder: Path, right: dict[str, float], seed: int, hit_rate: float | None = None):
    """A finished run: of each kind of 400 questions, a share answered rightly."""
    folder.mkdir(parents=True)
    rng, records = random.Random(seed), []
    for k, (key, share) in enumerate(right.items()):
        for i in range(400):
            score = float(rng.random() < share)
            records.append({"index": 400 * k + i, "key": key, "score": score})
    (folder / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    skills = {
        key: {"accuracy": sum(r["score"] for r in records if r["key"] == key) / 400, "n": 400}
        for key in right
    }
    (folder / "results.json").write_text(json.dumps({"skills": skills, "iteration": 3}))
    steps = [{"iteration": 1, "grad norm": 1.0}]
    if hit_rate is not None:
        steps = [
            {"iteration": i, "rollout/moe/hit_rate": hit_rate + 0.1 * (i > 0)} for i in range(11)
        ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))


def test_the_table_is_of_what_is_finished(tmp_path):
    for seed in (1, 2, 3):
        at = tmp_path / "clvr" / f"seed{seed}"
        write_run(at / "sft_continued", {"ocr": 0.6, "count": 0.3}, seed)
        write_run(at / "grpo", {"ocr": 0.8, "count": 0.4}, seed + 10)
        if seed < 3:
            write_run(at / "earl", {"ocr": 0.8, "count": 0.4}, seed + 20, hit_rate=0.4)
    (tmp_path / "clvr" / "seed1" / "unfinished").mkdir()
    text, rows = arms_table.table(tmp_path)
    found = {row["arm"]: row for row in rows}
    assert found.keys() == {"sft_continued", "grpo", "earl"} and "unfinished" not in text
    assert (found["grpo"]["seeds"], found["earl"]["seeds"], found["grpo"]["questions"]) == (
        3,
        2,
        800,
    )
    mean, low, high = found["grpo"]["differences"]["sft_continued"]
    # 0.15 expected, of 2,400 questions: a standard error of 0.02.
    assert 0.09 < low < mean < high < 0.21
    mean, low, high = found["earl"]["differences"]["grpo"]
    assert low < 0 < high and high - low < 0.16
    assert "earl_shuffled" not in found["earl"]["differences"]
    first, last = found["earl"]["router"]["hit_rate"]
    assert (first, last) == (pytest.approx(0.4), pytest.approx(0.5))
    assert found["grpo"]["router"] == {}


def test_before_and_after_adds_to_the_results(tmp_path, capsys):
    write_run(tmp_path / "demo", {"ocr": 0.6}, 1)
    write_run(tmp_path / "demo" / "earl", {"ocr": 0.9}, 2, hit_rate=0.3)
    arms_table.main(
        ["--before", str(tmp_path / "demo"), "--after", str(tmp_path / "demo" / "earl")]
    )
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["iteration"] == 3 and results["sft"].keys() == results["earl"].keys() == {"ocr"}
    assert results["difference"][1] > 0.15
    assert results["router"]["hit_rate"] == pytest.approx({"before": 0.3, "after": 0.4})
    said = capsys.readouterr().out
    assert "ocr" in said and "95 % interval" in said
    with pytest.raises(SystemExit, match="has not ended"):
        arms_table.main(["--before", str(tmp_path), "--after", str(tmp_path)])

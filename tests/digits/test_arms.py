"""The comparison of arms: its configs, its table and its intervals, on runs written by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from examples.digits import arms_table
from examples.digits import compare_arms as arms
from megatron_mm.config import load, validate

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("arm", arms.ARMS)
def test_every_arm_is_a_run_on_one_rank_and_on_two(arm):
    flags = ["--load", "x"] + (["--skill-map", "map.json"] if arm.startswith("earl") else [])
    run = load(str(arms.DIGITS / "arms" / f"{arm}.yaml"), flags)
    validate(run, 2)
    validate(load(str(arms.DIGITS / "arms" / f"{arm}.yaml"), [*flags, *arms.one_stage()]), 1)
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
    steps = [{"iteration": 1, "train/grad_norm": 1.0}]
    if hit_rate is not None:
        steps = [
            {"iteration": i, "rollout/moe/hit_rate": hit_rate + 0.1 * (i > 0)} for i in range(11)
        ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))


def write_experts(folder: Path, hit: float, nats: float, selective: float):
    """Output of the discovery tool about a run's end."""
    measured = {"ocr": {"hit": hit, "experts": 2.0}, "sum": {"hit": 0.0, "experts": 0.0}}
    info = {"measured": measured, "mutual_information": [nats, nats + 0.2]}
    info["causal_test"] = {"selectivity": {"ocr": selective, "sum": selective + 0.2}}
    (folder / "experts.json").write_text(json.dumps({"info": info}))


def test_the_table_is_of_what_is_finished(tmp_path):
    for seed in (1, 2, 3):
        at = tmp_path / "clvr" / f"seed{seed}"
        write_run(at / "sft_continued", {"ocr/free": 0.6, "sum/free": 0.3, "ocr": 0.9}, seed)
        write_run(at / "grpo", {"ocr/free": 0.8, "sum/free": 0.4, "ocr": 0.9}, seed + 10)
        write_experts(at / "grpo", 0.3, 0.1, 0.1)
        if seed < 3:
            write_run(at / "earl", {"ocr/free": 0.8, "sum/free": 0.4, "ocr": 0.9}, seed + 20)
            write_experts(at / "earl", 0.5 + 0.01 * seed, 0.1, 0.1 + 0.2 * seed)
    for seed in (2, 3):
        at = tmp_path / "none" / f"seed{seed}" / "grpo"
        write_run(at, {"ocr/free": 0.1, "sum/free": 0.1, "ocr": 0.1}, 4)
        write_experts(at, 0.4, 0.1, 0.1)
    (tmp_path / "clvr" / "seed1" / "unfinished").mkdir()
    rows = arms_table.table(tmp_path)
    text = arms_table.markdown(rows)
    found = {row["arm"]: row for row in rows if row["memory"] == "clvr"}
    assert found.keys() == {"sft_continued", "grpo", "earl"} and "unfinished" not in text
    seeds = [found[arm]["seeds"] for arm in ("grpo", "earl")]
    assert seeds == [3, 2] and found["grpo"]["questions"] == 800
    assert found["grpo"]["accuracy"] == pytest.approx(0.6, abs=0.05)
    assert found["grpo"]["others"] == pytest.approx(0.9, abs=0.05)
    over = found["grpo"]["differences"]["`sft_continued`"]
    mean, low, high = over["accuracy"]
    # 0.15 expected, of 2,400 questions: a standard error of 0.02.
    assert over["seeds"] == 3 and 0.09 < low < mean < high < 0.21
    assert over["others"][1] < 0 < over["others"][2] and "hit_rate" not in over
    none = found["grpo"]["differences"]["none"]  # its experts are those of another map
    assert none["seeds"] == 2 and none["accuracy"][1] > 0.3 and "hit_rate" not in none
    over = found["earl"]["differences"]["`grpo`"]
    assert over["accuracy"][1] < 0 < over["accuracy"][2]
    assert found["earl"]["experts"] == pytest.approx(
        {"hit_rate": 0.515, "mutual_information": 0.2, "selectivity": 0.5}
    )
    # Two seeds, 0.21 and 0.22: t of one degree of freedom is 12.7 times a standard error of 0.005.
    assert over["hit_rate"] == pytest.approx((0.215, 0.1515, 0.2785), abs=1e-4)
    assert over["mutual_information"] == pytest.approx((0, 0, 0), abs=1e-12)
    assert "`earl_shuffled`" not in found["earl"]["differences"]


def test_the_readme_shows_the_recorded_table():
    rows = json.loads((ROOT / "examples" / "benchmarks" / "arms.json").read_text())
    assert arms_table.markdown(rows) in (ROOT / "examples" / "digits" / "README.md").read_text()


def test_runs_that_were_asked_other_questions_are_not_compared(tmp_path):
    write_run(tmp_path / "one", {"ocr": 0.6}, 1)
    write_run(tmp_path / "other", {"count": 0.6}, 1)
    one, other = (arms_table.read_scores(tmp_path / name) for name in ("one", "other"))
    with pytest.raises(SystemExit, match="other questions: 0 of 800 are shared"):
        arms_table.difference([one], [other])


def test_before_and_after_adds_to_the_results(tmp_path, capsys):
    write_run(tmp_path / "demo", {"ocr": 0.6}, 1)
    write_run(tmp_path / "demo" / "earl", {"ocr": 0.9}, 2, hit_rate=0.3)
    arms_table.main(
        ["--before", str(tmp_path / "demo"), "--after", str(tmp_path / "demo" / "earl")]
    )
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["iteration"] == 3 and results["sft"].keys() == results["earl"].keys() == {"ocr"}
    assert results["difference"]["reinforced questions"][1] > 0.15
    assert results["router"]["hit_rate"] == pytest.approx({"before": 0.3, "after": 0.4})
    said = capsys.readouterr().out
    assert "ocr" in said and "95 % interval" in said
    with pytest.raises(SystemExit, match="has not ended"):
        arms_table.main(["--before", str(tmp_path), "--after", str(tmp_path)])

"""The cascade: its configs, its rows, its jobs, and its table on runs written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from examples.cascade import arms, rows, table
from examples.digits.jobs import one_stage
from megatron_mm.config import load, validate
from megatron_mm.preference.settings import DPOConfig, loss_terms

OBJECTIVES = {"mpo": "dpo", "chosen": "sft", "gspo": "grpo", "opd": "grpo", "again": "sft"}
MPO = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}


def test_every_config_is_a_run_on_one_rank_and_on_two():
    assert {path.stem for path in arms.CASCADE.glob("*.yaml")} == {*OBJECTIVES}
    for config, objective in OBJECTIVES.items():
        path = str(arms.CASCADE / f"{config}.yaml")
        run = load(path, [])
        validate(run, 2)
        validate(load(path, one_stage()), 1)
        assert run.training.objective == objective and run.checkpoint.finetune


def test_sides_are_exchanged_in_half_of_the_pairs_and_nothing_else_changes():
    pairs = [{"prompt": [n], "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(1000)]
    made = [*rows.swapped(pairs, 1)]
    turned = [row["chosen"] == pair["rejected"] for row, pair in zip(made, pairs, strict=True)]
    assert 430 < sum(turned) < 570  # 4.4 standard deviations around 500
    assert made == [*rows.swapped(pairs, 1)] != [*rows.swapped(pairs, 2)]
    for row, pair, other in zip(made, pairs, turned, strict=True):
        back = {"chosen": row["rejected"], "rejected": row["chosen"]} if other else {}
        assert row | back == pair


def test_chosen_sides_are_rows_once():
    prompt = [{"role": "user", "content": "<image>?"}]
    one = {"prompt": prompt, "chosen": "3", "rejected": "4", "images": ["a.png"], "skill": "ocr"}
    made = [*rows.chosen([one, one | {"rejected": "5"}, one | {"chosen": "03"}])]
    answers = [{"role": "assistant", "content": text} for text in ("3", "03")]
    kept = {"images": ["a.png"], "skill": "ocr"}
    assert made == [kept | {"messages": [*prompt, answer]} for answer in answers]


def test_the_jobs(tmp_path):
    jobs = arms.jobs(tmp_path, [1, 2], arms.Size(questions=8))
    done = [job.done for job in jobs]
    assert len(set(done)) == len(done)
    seen = {}
    for number, job in enumerate(jobs):
        assert set(job.needs) <= set(done[:number])
        if "megatron_mm.train" not in job.command:
            continue
        name = job.done.parent.name
        config = job.command[job.command.index("--config") + 1]
        flags = job.command[job.command.index("--output-dir") :]
        late = () if name == "gspo" else job.late()
        run = load(config, [*flags, *late])
        validate(run, 1)
        seen[name] = run
        if run.checkpoint.load:
            assert Path(run.checkpoint.load).parent / "answers.jsonl" in job.needs
    assert tuple(seen) == arms.ARMS
    terms = {name: loss_terms(seen[name].section(DPOConfig)) for name in ("mpo", "swapped")}
    assert terms == {"mpo": MPO, "swapped": MPO}
    assert loss_terms(seen["sigmoid"].section(DPOConfig)) == {"sigmoid": 1.0}
    # The control has as many sequences a step, and as many steps.
    pairs, right = seen["mpo"].training, seen["chosen"].training
    assert 2 * pairs.global_batch_size == right.global_batch_size
    assert pairs.train_iters == right.train_iters


def test_gspo_alone_has_the_time_of_the_cascade(tmp_path):
    jobs = arms.jobs(tmp_path, [1], arms.Size(questions=8))
    (alone,) = [job for job in jobs if job.done.parent.name == "gspo"]
    (rated,) = [job for job in jobs if job.done.name == "seed1_rated.jsonl"]
    rows.seconds_file(rated.done).parent.mkdir(parents=True)
    rows.seconds_file(rated.done).write_text("30.0\n")
    for name, seconds in (("mpo", 60.0), ("mpo_gspo", 90.0)):
        folder = tmp_path / "seed1" / name
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"seconds": seconds}))
    assert alone.late() == ("--exit-duration-in-mins", "3.0000")


def test_seconds_of_an_ended_rating_count_too(tmp_path, monkeypatch):
    """The file that it had begun is finished by the next."""
    clock, ends = iter([0.0, 40.0, 100.0, 125.0]), iter([KeyboardInterrupt, None])

    def run(command):
        if (end := next(ends)) is not None:
            raise end
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(rows, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(rows.subprocess, "run", run)
    command = ["rate", "--data", str(tmp_path / "pool.jsonl"), "--out", str(tmp_path / "r.jsonl")]
    with pytest.raises(KeyboardInterrupt):
        rows.main(command)
    assert rows.main(command) == 0
    assert rows.seconds_file(tmp_path / "r.jsonl").read_text() == "65.0\n"


def answers(folder: Path, scores: dict[str, list[float]], logps: list[float] | None = None):
    folder.mkdir(parents=True)
    records = [
        {"key": key, "index": n, "score": score}
        for key, of_key in scores.items()
        for n, score in enumerate(of_key)
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    steps = [{"iteration": n, "logps/chosen": value} for n, value in enumerate(logps or [], 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in steps))


def test_the_table(tmp_path):
    before = {"spatial/free": [1, 0, 0, 0], "spatial/steps": [1, 1, 1, 0], "ocr/direct": [1, 1]}
    after = {"spatial/free": [1, 1, 1, 0], "spatial/steps": [1, 1, 0, 0], "ocr/direct": [1, 1]}
    for seed in (1, 2):
        answers(tmp_path / f"seed{seed}" / "base", before)
        answers(tmp_path / f"seed{seed}" / "mpo", after, [-12.0, -13.0, -10.5])
    found = table.summary(tmp_path)
    base, mpo = found["arms"]
    assert (base["free"], base["other"]) == (0.25, 0.875)
    assert (mpo["free"], mpo["spatial/steps"], mpo["logps/chosen"]) == (0.75, 0.5, 1.5)
    assert base["logps/chosen"] is None
    (row,) = found["against"]
    assert (row["arm"], row["other"], row["seeds"]) == ("mpo", "base", 2)
    assert row["free"][0] == pytest.approx(0.5) and row["free by seed"] == [0.5, 0.5]
    assert row["other kinds"][0] == pytest.approx(-0.125)
    assert len(found["missing"]) == 2 * (len(arms.ARMS) - 2)
    text = table.markdown(found)
    assert "| `mpo` over `base` | 2 | +0.500 [" in text and "Missing: 16 runs" in text

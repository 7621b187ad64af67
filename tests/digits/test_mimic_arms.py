"""The comparison of mimic learning: its jobs, its measures, and its table on runs by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from examples.mimic import arms, table
from examples.mimic.measure import SHARES, alike, at_shares, flipped, image_of
from megatron_mm.config import hops, load, validate
from megatron_mm.earl.skill_map import SkillMap
from megatron_mm.mimic.expert_map import ExpertMap
from megatron_mm.mimic.map_command import settings as map_settings
from megatron_mm.mimic.record_command import settings as record_settings
from megatron_mm.mimic.settings import MimicConfig


def test_the_jobs(tmp_path):
    jobs = arms.jobs(tmp_path, [1, 2], arms.Size(questions=8))
    done = [job.done for job in jobs]
    assert len(set(done)) == len(done)
    runs = {}
    for number, job in enumerate(jobs):
        assert set(job.needs) <= set(done[:number])
        flags = list(job.command[1:])
        if job.command[0].endswith("record_routes.py"):
            assert record_settings(flags)[0].data == [
                str(tmp_path / "data" / f"{name}.jsonl") for name in ("align", "mix")
            ]
        if job.command[0].endswith("map_experts.py"):
            start = job.done.parent.name
            expected = {"scratch": "clusters", "tuned": "transport"}[start]
            assert map_settings(flags)[0].method == expected
        if "megatron_mm.train" not in job.command or tmp_path / "seed2" in job.done.parents:
            continue
        config = job.command[job.command.index("--config") + 1]
        run = load(config, [*job.command[job.command.index("--output-dir") :], *job.late()])
        validate(run, 1)
        runs[job.done.parent.relative_to(tmp_path).as_posix().removeprefix("seed1/")] = run, job
        assert run.checkpoint.resume
        named = run.section(MimicConfig)
        for path in (run.checkpoint.load, named.mimic_routes, named.mimic_map):
            made = {*job.needs, *(need.parent / "checkpoint" for need in job.needs)}
            assert path is None or Path(path) in made
    assert [*runs] == ["teacher", *(f"{s}/{a}" for s in arms.STEPS for a in arms.ARMS)]
    teacher, student = runs["teacher"][0], runs["scratch/mimic"][0]
    assert len([job for job in jobs if job.done.name == "routes.st"]) == 1  # of one teacher
    assert teacher.model.language.num_experts == 2 * student.model.language.num_experts == 16
    assert len(hops(teacher.model)) == 6
    assert teacher.training.train_iters == 2 * student.training.train_iters == 4400
    for start, steps in arms.STEPS.items():
        for name in arms.ARMS:
            run = runs[f"{start}/{name}"][0]
            # A checkpoint at each of the shares that are measured, and none of them is deleted.
            assert (
                run.training.train_iters == steps and run.checkpoint.keep_last_checkpoints is None
            )
            assert all(steps * share // 100 % run.checkpoint.save_interval == 0 for share in SHARES)
            same = {"train_data", "valid_data"}
            for key in same:
                assert getattr(run.data, key) == getattr(runs[f"{start}/sft"][0].data, key)
    found = {name: runs[f"tuned/{name}"][0].section(MimicConfig) for name in arms.ARMS}
    assert found["sft"] == MimicConfig()
    assert all(found[name].mimic_kd_coeff == 1 for name in arms.ARMS if name != "sft")
    coefficients = [found[name].mimic_route_coeff for name in arms.ARMS]
    assert coefficients == [0, 0, 0.1, 0.1, 0.1, 0.1]
    assert found["permuted"].mimic_map_shuffle_seed == found["another_row"].mimic_row_shuffle_seed
    assert (found["held"].mimic_anneal_share, found["mimic"].mimic_anneal_share) == (0, 0.5)
    measured = [job for job in jobs if job.done.name == "points.json"]
    assert len(measured) == 2 * 2 * len(arms.ARMS)
    shuffled = [job.done.parent.name for job in measured if "--shuffled" in job.command]
    assert {*shuffled} == {"permuted"}


def test_a_clusters_image(tmp_path):
    skills = SkillMap(3, 4, 2, {"ocr": [[0, 1], [3], []], "hop": [[2], [0], [1]]})
    a = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.0, 1.0], [0.3, 0.7]])
    mapped = ExpertMap("t", {0: 0, 1: 2}, {0: a, 1: a.flip(1)})
    found = image_of(skills, mapped, 2, 2, 1)
    assert found.skills == {"ocr": [[0], []], "hop": [[1], [1]]}


def test_what_breaks_alike():
    def causal(*falls: float) -> dict:
        names = ("ocr", "hop")
        without = {
            a: {b: 1 - falls[2 * i + j] for j, b in enumerate(names)} for i, a in enumerate(names)
        }
        return {"accuracy": dict.fromkeys(names, 1.0), "without": without}

    teacher = causal(0.5, 0.0, 0.1, 0.6)
    assert alike(teacher, causal(0.25, 0.0, 0.05, 0.3)) == pytest.approx(1.0)
    assert alike(teacher, causal(0.0, 0.6, 0.5, 0.1)) < -0.5
    assert alike(teacher, causal(0.0, 0.0, 0.0, 0.0)) is None


def test_routes_that_changed():
    def one(*experts: int) -> SimpleNamespace:
        return SimpleNamespace(experts=torch.tensor(experts).view(1, 2, 2))

    before = {("a", 1): one(0, 1, 2, 3), ("a", 2): one(4, 5, 6, 7)}
    after = {("a", 1): one(1, 0, 2, 9), ("a", 2): one(4, 5, 7, 6)}
    assert flipped(before, after) == 1 / 8  # order does not count


def test_checkpoints_at_shares(tmp_path):
    for step in (2, 4, 5, 10, 20):
        (tmp_path / f"iter_{step:07d}").mkdir()
    assert {s: p.name for s, p in at_shares(tmp_path).items()} == {
        10: "iter_0000002", 25: "iter_0000005", 50: "iter_0000010", 100: "iter_0000020",
    }  # fmt: skip
    (tmp_path / "iter_0000005").rmdir()
    with pytest.raises(SystemExit, match="no checkpoint at 25 % of 20 steps"):
        at_shares(tmp_path)


def write_run(folder: Path, scores: list[float], kl: float | None) -> None:
    """A measured run whose four questions of one kind had these mean scores at the shares."""
    folder.mkdir(parents=True)
    of = {
        s: {"ocr": {str(n): float(n < 4 * m) for n in range(4)}}
        for s, m in zip(SHARES, scores, strict=True)
    }
    points = {
        str(s): {"flips": None if s == 10 else 0.2, "scores": of[s] if s < 100 else None}
        for s in SHARES
    }
    held = {"points": points, "information": 0.3, "causal": {}, "alike": None}
    (folder / "points.json").write_text(json.dumps(held))
    records = [{"key": "ocr", "index": int(n), "score": s} for n, s in of[100]["ocr"].items()]
    (folder / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    step = {"iteration": 1} | ({} if kl is None else {"moe/mimic_kl": kl})
    (folder / "metrics.jsonl").write_text(json.dumps(step) + "\n")


def test_the_table(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"seed{seed}" / "scratch" / "kd", [0, 0.25, 0.5, 0.5], None)
        write_run(tmp_path / f"seed{seed}" / "scratch" / "mimic", [0.25, 0.5, 0.5, 0.75], 0.1)
    found = table.summary(tmp_path)
    kd, mimic = found["scratch"]
    assert [mimic[f"{share} %"] for share in SHARES] == [0.25, 0.5, 0.5, 0.75]
    assert (mimic["flips"], mimic["information"]) == (pytest.approx(0.2), 0.3)
    assert (mimic["moe/mimic_kl"], kd["moe/mimic_kl"], mimic["alike"]) == (0.1, None, None)
    (row,) = found["scratch against"]
    assert (row["arm"], row["other"], row["seeds"]) == ("mimic", "kd", 2)
    assert [row[f"{share} %"][0] for share in SHARES] == [0.25, 0.25, 0.0, 0.25]
    assert len(found["missing"]) == 2 * (2 * len(arms.ARMS) - 2)
    text = table.markdown(found)
    assert "| `mimic` over `kd` | 2 | +0.250 [" in text and "Missing: 20 runs" in text

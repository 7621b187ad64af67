"""The comparison of mimic learning: its jobs, its measures, and its table on runs by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from examples.mimic import arms, table
from examples.mimic.measure import SHARES, alike, at_shares, flipped, image_of
from megatron_mm.config import hops, load, validate
from megatron_mm.earl.skill_map import SkillMap
from megatron_mm.mimic.expert_map import ExpertMap
from megatron_mm.mimic.layer_match import by_depth
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
            from_nothing = job.done.parent.name == "scratch"
            assert (job.done.name == "map.st") == (job.done.parent.name in arms.STARTS)
            assert map_settings(flags)[0].method == ("clusters" if from_nothing else "transport")
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
    assert [*runs] == ["teacher", *(f"{s}/{a}" for s, of in arms.STARTS.items() for a in of)]
    teacher, student = runs["teacher"][0], runs["scratch/mimic"][0]
    assert len([job for job in jobs if job.done.name == "routes.st"]) == 1  # of one teacher
    assert teacher.model.language.num_experts == 2 * student.model.language.num_experts == 16
    kinds = [*hops(teacher.model)], [*hops(student.model)]
    assert len(kinds[0]) == 6
    # By depth a layer has one of its own kind, on the same side of the look.
    before = [_before(run.model.hybrid_layer_pattern) for run in (teacher, student)]
    assert [before[0][n] for n in by_depth(4, 6, range(6))] == before[1]
    assert teacher.training.train_iters == 2 * student.training.train_iters == 4400
    for start, steps in arms.STEPS.items():
        for name in arms.STARTS[start]:
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
    assert runs["scratch/mimic"][0].section(MimicConfig).mimic_anneal_share == 1
    kd = found["kd"]
    assert kd.mimic_map and not kd.mimic_route_coeff  # which only measures
    measured = [job for job in jobs if job.done.name == "points.json"]
    assert len(measured) == 2 * sum(map(len, arms.STARTS.values()))
    for job in measured:
        assert job.command[job.command.index("--map") + 1] == str(job.done.with_name("own.st"))


def _before(pattern: str) -> list[str]:
    """Returns the letter before each layer of experts, with the side of the look it is on."""
    pattern = pattern.replace(" ", "")
    side = pattern.index("LJ")
    return [f"{pattern[n - 1]}{n > side}" for n, kind in enumerate(pattern) if kind == "E"]


def test_a_clusters_image(tmp_path):
    skills = SkillMap(3, 4, 2, {"ocr": [[0, 1], [3], []], "hop": [[2], [0], [1]]})
    a = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.0, 1.0], [0.3, 0.7]])
    mapped = ExpertMap("t", {0: 0, 1: 2}, {0: a, 1: a.flip(1)})
    found = image_of(skills, mapped, 2, 2, 1)
    assert found.skills == {"ocr": [[0], []], "hop": [[1], [1]]}
    # Two of four of the teacher's experts stand for two of the student's: both are its image.
    pair = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    mapped = ExpertMap("t", {0: 0}, {0: pair})
    assert image_of(skills, mapped, 3, 1, 1).skills["ocr"] == [[0, 1]]


def causal(fall: np.ndarray) -> dict:
    names = [f"skill {n}" for n in range(len(fall))]
    without = {a: {b: 1 - fall[i, j] for j, b in enumerate(names)} for i, a in enumerate(names)}
    return {"accuracy": dict.fromkeys(names, 1.0), "without": without}


def test_what_breaks_alike():
    draw = np.random.default_rng(0)
    theirs = draw.random((4, 4))
    found = alike(causal(theirs), causal(0.5 * theirs))
    assert found == (pytest.approx(1.0), 1 / 24)  # only their own order is as high
    opposite = alike(causal(theirs), causal(-theirs))
    assert opposite == (pytest.approx(-1.0), 1.0)
    assert alike(causal(theirs), causal(np.zeros((4, 4)))) is None
    assert alike(causal(theirs[:2, :2]), causal(theirs[:2, :2])) is None


def test_skills_that_fall_more_and_clusters_that_break_more_make_nobody_alike():
    """A skill at chance falls in no model, so raw falls of unrelated models correlate."""
    draw = np.random.default_rng(1)
    shared = draw.random((1, 6)) + draw.random((6, 1))
    raw, found = [], []
    for _ in range(100):
        one, other = (shared + 0.1 * draw.standard_normal((6, 6)) for _ in range(2))
        raw.append(np.corrcoef(one.ravel(), other.ravel())[0, 1])
        found.append(alike(causal(one), causal(other)))
    assert np.mean(raw) > 0.8
    # Of 25 free entries a correlation by chance has a deviation of 0.2, the mean of 100 of 0.02;
    # the odds are below 0.05 in 5 of 100, with a deviation of 2.2. Four deviations are allowed.
    assert abs(np.mean([correlation for correlation, _ in found])) < 0.08
    assert np.mean([odds < 0.05 for _, odds in found]) < 0.14


def test_routes_that_changed():
    def one(*experts: int) -> SimpleNamespace:
        return SimpleNamespace(experts=torch.tensor(experts).view(1, 2, 2))

    before = {("a", 1): one(0, 1, 2, 3), ("a", 2): one(4, 5, 6, 7)}
    after = {("a", 1): one(1, 0, 2, 9), ("a", 2): one(4, 5, 7, 6)}
    assert flipped(before, after) == 1 / 8  # order does not count


def test_checkpoints_at_shares(tmp_path):
    for step in (2, 4, 5, 7, 10, 20):
        (tmp_path / f"iter_{step:07d}").mkdir()
    assert {s: p.name for s, p in at_shares(tmp_path).items()} == {
        10: "iter_0000002",
        25: "iter_0000005",
        35: "iter_0000007",
        50: "iter_0000010",
        100: "iter_0000020",
    }
    (tmp_path / "iter_0000005").rmdir()
    with pytest.raises(SystemExit, match="no checkpoint at 25 % of 20 steps"):
        at_shares(tmp_path)


def write_run(folder: Path, scores: list[float], kl: float | None, losses: Sequence[float]) -> None:
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
    held = {"points": points, "information": 0.3, "causal": {}}
    held |= {"alike": 0.1 * len(scores), "alike by chance": 0.5}
    (folder / "points.json").write_text(json.dumps(held))
    records = [{"key": "ocr", "index": int(n), "score": s} for n, s in of[100]["ocr"].items()]
    (folder / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    steps = [{"iteration": n + 1, "train/lm_loss": loss} for n, loss in enumerate(losses)]
    steps = [step | ({} if kl is None else {"moe/mimic_kl": kl}) for step in steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


def test_the_table(tmp_path):
    loss = np.linspace(2, 0.1, 20)
    for seed in (1, 2):
        folder = tmp_path / f"seed{seed}" / "scratch"
        write_run(folder / "kd", [0, 0.25, 0.5, 0.5, 0.5], 0.2, loss)
        write_run(folder / "mimic", [0.25, 0.5, 0.5, 0.5, 0.75], 0.1, loss - 0.05 * seed)
        write_run(folder / "another_row", [0.25, 0.5, 0.5, 0.5, 0.75], 0.3, loss)
    teacher = [{"key": "ocr", "index": n, "score": n % 2} for n in range(4)]
    (tmp_path / "teacher").mkdir()
    lines = "".join(json.dumps(answer) + "\n" for answer in teacher)
    (tmp_path / "teacher" / "answers.jsonl").write_text(lines)
    found = table.summary(tmp_path)
    assert found["teacher"] == 0.5
    kd, mimic, other = found["scratch"]
    assert [mimic[f"{share} %"] for share in SHARES] == [0.25, 0.5, 0.5, 0.5, 0.75]
    assert (mimic["flips"], mimic["information"]) == (pytest.approx(0.2), 0.3)
    assert (mimic["kl"], kd["kl at the end"]) == (pytest.approx(0.1), pytest.approx(0.2))
    assert other["kl"] is None  # it is measured against the routes of another row
    assert kd["loss at 25 %"] == pytest.approx(loss[4]) and kd["alike"] == 0.5
    row = found["scratch against"][0]
    assert (row["arm"], row["other"], row["seeds"]) == ("mimic", "kd", 2)
    assert [row[f"{share} %"][0] for share in SHARES] == [0.25, 0.25, 0.0, 0.0, 0.25]
    assert row["loss at 10 % over seeds"][0] == pytest.approx(-0.075)
    assert row["alike over seeds"][0] == 0
    of_all = 2 * sum(map(len, arms.STARTS.values()))
    assert len(found["missing"]) == of_all - 6
    text = table.markdown(found)
    assert "Teacher: 0.500" in text and f"Missing: {of_all - 6} runs" in text
    assert "| `mimic` over `kd` | 2 | questions | +0.250 [" in text
    assert "| `mimic` over `kd` | 2 | loss, seeds | -0.075 [" in text

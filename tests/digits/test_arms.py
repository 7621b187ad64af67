"""The comparisons of arms: their configs, their jobs, and their tables on runs written by hand."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from examples.digits import compare_arms, earl_arms, earl_table, memory_arms, memory_table
from examples.digits.jobs import DIGITS, ROOT, Job, one_stage, run_all
from examples.digits.scores import gaps, over_questions, over_seeds, read_scores
from megatron_mm.config import load, validate
from support.arms import trained

CONFIGS = [path.stem for path in sorted((DIGITS / "arms").glob("*.yaml"))]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_is_a_run_on_one_rank_and_on_two(config):
    path = str(DIGITS / "arms" / f"{config}.yaml")
    run = load(path, [])
    validate(run, 2)
    validate(load(path, one_stage()), 1)
    expected = "grpo" if config.startswith(("grpo", "opd")) else "sft"
    assert run.checkpoint.finetune and run.training.objective == expected


@pytest.mark.parametrize("memory", memory_arms.MEMORIES)
def test_every_memory_is_a_run(memory):
    for arm in memory_arms.ARMS:
        flags = memory_arms.MEMORIES[memory]
        validate(load(str(DIGITS / "arms" / f"{arm}.yaml"), list(flags)), 2)


def flags_of(job: Job) -> dict[str, str]:
    """The flags of a command that take one value."""
    pairs = zip(job.command, job.command[1:], strict=False)
    return {name: value for name, value in pairs if name.startswith("--")}


@pytest.mark.parametrize("model", earl_arms.MODELS)
def test_the_jobs_of_earl(model, tmp_path):
    jobs = earl_arms.jobs(
        tmp_path, earl_arms.MODELS[model], [1, 2], [1, 2, 3], earl_arms.Size(questions=8)
    )
    done = [job.done for job in jobs]
    assert len(set(done)) == len(done)
    for job, run in trained(jobs):
        given = earl_arms.MODELS[model].flags
        assert run.model.language.num_experts == (32 if "32" in given else 8)
        if load_from := run.checkpoint.load:
            start = Path(load_from).parent
            assert start / "answers.jsonl" in job.needs and start.parents[-1] == Path("/")
    runs = {path.parent.relative_to(tmp_path) for path in done if path.name == "answers.jsonl"}
    wanted = {Path(f"seed{seed}") / name for seed in (1, 2) for name in ("base", *earl_arms.arms())}
    assert runs == wanted and len(wanted) == 2 * (1 + 7 + 9 + 7)
    # The most telling come first: both seeds' single skill before anything on all questions.
    places = {path: number for number, path in enumerate(done)}
    ours = [places[tmp_path / f"seed2/one/{arm}/answers.jsonl"] for arm in ("grpo", "scope")]
    assert max(ours) < min(n for path, n in places.items() if "all" in path.parts)


def test_what_arms_start_from_and_learn_from(tmp_path):
    jobs = earl_arms.jobs(tmp_path, earl_arms.MODELS["tiny"], [1], [1, 2, 3], earl_arms.Size())
    found = {
        job.done.parent.relative_to(tmp_path / "seed1").as_posix(): flags_of(job)
        for job in jobs
        if job.done.name == "answers.jsonl"
    }
    seed = tmp_path / "seed1"
    expected = {  # start, map, rows
        "sft/plain": ("base", None, "mix"),
        "sft/shuffled": ("base", "shuffled", "mix"),
        "sft/lift": ("base", "lift", "mix"),
        "one/grpo": ("sft/plain", None, "rl_one"),
        "one/scope": ("sft/aligned", "map", "rl_one"),
        "one/aligned": ("sft/aligned", None, "rl_one"),
        "one/shuffled_scope": ("sft/shuffled", "shuffled", "rl_one"),
        "all/scope": ("sft/aligned", "map", "rl"),
    }
    for name, (start, skill_map, rows) in expected.items():
        flags = found[name]
        assert flags["--load"] == str(seed / start / "checkpoint")
        assert flags.get("--skill-map") == (skill_map and str(seed / f"{skill_map}.json"))
        assert flags["--train-data"] == str(tmp_path / "data" / f"{rows}.jsonl")
    assert found["one/kl"]["--ref-load"] == found["one/kl"]["--load"]
    assert found["sft/zero"]["--router-align-coeff"] == "0"


def made(target: Path, text: str, *needs: Path) -> Job:
    """A job that writes a file in two pieces and notes when it ran."""
    part = target.with_name(f"part_{target.name}")
    code = (
        f"import pathlib, sys\nsys.stderr.write({text!r})\n"
        f"with open({str(target.parent / 'order')!r}, 'a') as file: file.write({target.name!r})\n"
        f"if {text!r}.startswith('error:'): sys.exit(1)\n"
        f"pathlib.Path({str(part)!r}).write_text({text!r})\n"
    )
    log = target.with_suffix(".log")
    return Job(target, ("-c", code), log, needs, moves=((part, target),))


def test_jobs_run_once_in_order_and_a_failed_one_stops_its_own(tmp_path, capsys):
    a, b, c, d, e = (tmp_path / name for name in "abcde")
    jobs = [made(b, "", a), made(a, "fine"), made(c, "error: no"), made(d, "", c), made(e, "")]
    threads = threading.active_count()  # other tests may have left some
    failed = run_all(jobs, 1)
    assert (tmp_path / "order").read_text() == "abce"
    assert failed == [
        f"{tmp_path}/c.log: error: no",
        f"1 not begun; {d} needs {c}, for example",
    ]
    assert a.read_text() == "fine" and not (tmp_path / "part_a").exists()
    # Again: what is done stays, what failed is tried.
    run_all(jobs, 2)
    assert (tmp_path / "order").read_text() == "abcec"
    assert f"{a}: begins" in capsys.readouterr().out and threading.active_count() == threads


def test_jobs_run_side_by_side(tmp_path):
    """Each of two jobs ends only when the other has begun."""
    jobs = []
    for name, other in (("a", "b"), ("b", "a")):
        code = (
            "import pathlib, time\n"
            f"pathlib.Path({str(tmp_path / name)!r} + '.begun').touch()\n"
            "for _ in range(600):\n"
            f"    if pathlib.Path({str(tmp_path / other)!r} + '.begun').exists(): break\n"
            "    time.sleep(0.1)\n"
            "else: raise SystemExit('error: alone')\n"
            f"pathlib.Path({str(tmp_path / name)!r}).touch()\n"
        )
        jobs.append(Job(tmp_path / name, ("-c", code), tmp_path / f"{name}.log"))
    assert run_all(jobs, 2) == []


def write_answers(run: Path, right: dict[str, np.ndarray]):
    """The answers of a finished run: a score for each question of each kind."""
    run.mkdir(parents=True)
    lines, index = [], 0
    for key, scores in right.items():
        for value in scores:
            lines.append(json.dumps({"index": index, "key": key, "score": float(value)}))
            index += 1
    (run / "answers.jsonl").write_text("\n".join(lines) + "\n")


def shares(*right: int, of: int = 100) -> np.ndarray:
    """Scores of which the first so many are right."""
    return np.concatenate([np.arange(of) < n for n in right]).astype(float)


def test_intervals_by_hand(tmp_path):
    write_answers(tmp_path / "a", {"ocr": shares(80), "sum": shares(50)})
    write_answers(tmp_path / "b", {"ocr": shares(60), "sum": shares(50)})
    one, other = (read_scores(tmp_path / name / "answers.jsonl") for name in "ab")
    values = gaps([one], [other])
    mean, low, high = over_questions(values)
    # 20 of 100 scenes gained in one of two kinds: a variance of 0.2 x 0.8 x 100 / 99 of the halves.
    half = 1.959964 * (0.16 / 99) ** 0.5 / 2
    assert (mean, low, high) == pytest.approx((0.1, 0.1 - half, 0.1 + half))
    # Two seeds, 0.21 and 0.22: t of one degree of freedom is 12.7 times a standard error of 0.005.
    assert over_seeds([0.21, 0.22]) == pytest.approx((0.215, 0.1515, 0.2785), abs=1e-4)
    assert over_seeds([0.21]) is None
    write_answers(tmp_path / "c", {"count": shares(60)})
    third = read_scores(tmp_path / "c" / "answers.jsonl")
    with pytest.raises(SystemExit, match="other questions: 0 of 300 are shared"):
        gaps([one], [third])


def write_measures(run: Path, hit: float, own: float):
    measured = {"ocr": {"hit": hit, "experts": 1.0}, "sum": {"hit": hit + 0.2, "experts": 1.0}}
    whole = {"ocr": 0.9, "sum": 0.5}
    causal = {
        "accuracy": whole,
        "without": {"ocr": {"ocr": 0.9 - own, "sum": 0.48}, "sum": {"ocr": 0.9, "sum": 0.5 - own}},
    }
    info = {"measured": measured, "mutual_information": [0.1, 0.3], "causal_test": causal}
    (run / "experts.json").write_text(json.dumps({"info": info}))
    kept = {"2": {"ocr": 0.4, "sum": 0.1}, "8": {"ocr": 0.9, "sum": 0.1}}
    beyond = {"larger": {"ocr": 0.3, "sum": 0.1}, "longer": {"multihop": 0.05}}
    held = {"num_experts": 8, "kept": kept, "beyond": beyond}
    (run / "measures.json").write_text(json.dumps(held))


def test_the_tables_of_earl_by_hand(tmp_path):
    one, kinds = earl_arms.ONE, (earl_arms.ONE, "ocr", "sum", "sum/free", "multihop")
    start = dict(zip(kinds, (20, 90, 50, 50, 70), strict=True))
    after = {  # arm -> seed -> right of each kind
        "one/grpo": {1: (90, 80, 50, 40, 60), 2: (86, 80, 48, 40, 60)},
        "one/scope": {1: (88, 90, 50, 50, 70), 2: (84, 89, 50, 51, 70)},
        "all/grpo": {1: (90, 80, 50, 60, 70)},
    }
    for seed in (1, 2):
        at = tmp_path / f"seed{seed}"
        write_answers(at / "base", {k: shares(n) for k, n in start.items()})
        for arm in ("sft/plain", "sft/aligned"):
            write_answers(at / arm, {k: shares(n) for k, n in start.items()})
        write_measures(at / "sft/aligned", 0.4 + 0.1 * seed, 0.3)
        for arm, by_seed in after.items():
            if seed in by_seed:
                right = dict(zip(kinds, by_seed[seed], strict=True))
                write_answers(at / arm, {k: shares(n) for k, n in right.items()})
                rewards = [0.3, 0.5, *[0.8] * 6]
                steps = [
                    {"iteration": i + 1, f"reward/task/{one}": r} for i, r in enumerate(rewards)
                ]
                (at / arm / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)) + "\n")
    found = earl_table.summary(tmp_path)
    grpo, scope = found["one"]
    assert (grpo["arm"], scope["arm"], grpo["seeds"]) == ("grpo", "scope", 2)
    assert grpo["gain"]["value"] == pytest.approx(0.68)
    assert grpo["gain"]["seeds"] == pytest.approx(0.02 * 12.7062, rel=1e-4)
    assert grpo["collateral"]["value"] == pytest.approx((-20 / 3 - 22 / 3) / 200)
    assert grpo["own forms"]["value"] == pytest.approx(-0.1)
    # One kind of `scope` lost what another gained.
    assert grpo["moved"]["value"] == pytest.approx(0.07)
    assert scope["moved"]["value"] == pytest.approx(0.01 / 3)
    assert grpo["by kind"].keys() == {"ocr", "sum", "sum/free", "multihop"}
    assert grpo["worst"]["kind"] in ("ocr", "sum/free")
    assert grpo["worst"]["value"] == pytest.approx(-0.1)
    # 0.3, 0.5 and three of 0.8 are 0.64 on average; the next five are 0.74.
    assert grpo["steps"] == [6.0, 6.0]
    assert scope["collateral"]["value"] == pytest.approx(0.0) and "hit" not in scope
    (against,) = found["one against"]
    assert (against["arm"], against["other"], against["seeds"]) == ("scope", "grpo", 2)
    assert against["gain"]["value"] == pytest.approx(-0.02)
    assert against["collateral"]["value"] == pytest.approx(0.07)
    (on_all,) = found["all"]
    assert on_all["gain"]["value"] == pytest.approx(0.4)  # of both kinds in any form
    assert on_all["collateral"]["value"] == pytest.approx(-0.1 / 3) and on_all["seeds"] == 1
    assert "own forms" not in on_all
    assert on_all["collateral"]["seeds"] is None
    plain, aligned = found["sft"]
    assert plain["free"] == pytest.approx(0.35) and plain["other"] == pytest.approx(0.7)
    assert aligned["hit"]["value"] == pytest.approx(0.65)
    assert aligned["own"]["value"] == pytest.approx(0.3)
    assert aligned["others"]["value"] == pytest.approx(0.01)
    assert aligned["kept 2"]["value"] == pytest.approx(0.4)  # `sum` is not learnt
    assert aligned["larger"]["value"] == pytest.approx(0.2)
    assert aligned["free against plain"]["value"] == 0
    # 2 seeds: one/grpo, one/scope and 1 of all/grpo answered, and so on.
    missing = found["missing"]
    assert "seed2/all/grpo/answers.jsonl" in missing and "seed1/sft/plain/experts.json" in missing
    assert "seed1/sft/aligned/experts.json" not in missing
    text = earl_table.markdown(found)
    assert "| `grpo` | 2 | +0.680 ±" in text and f"Missing: {len(missing)} files" in text
    assert json.loads(json.dumps(found)) == found


def test_the_table_of_memories_is_of_what_is_finished(tmp_path):
    for seed in (1, 2, 3):
        at = tmp_path / "clvr" / f"seed{seed}"
        for arm, right in (("sft_continued", (60, 30, 90)), ("grpo", (80, 40, 90))):
            kinds = dict(zip(("ocr/free", "sum/free", "ocr"), right, strict=True))
            write_answers(at / arm, {k: shares(n) for k, n in kinds.items()})
    for seed in (2, 3):
        at = tmp_path / "none" / f"seed{seed}" / "grpo"
        write_answers(at, {k: shares(10) for k in ("ocr/free", "sum/free", "ocr")})
    (tmp_path / "clvr" / "seed1" / "unfinished").mkdir()
    rows = memory_table.table(tmp_path)
    text = memory_table.markdown(rows)
    found = {row["arm"]: row for row in rows if row["memory"] == "clvr"}
    assert found.keys() == {"sft_continued", "grpo"} and "unfinished" not in text
    assert found["grpo"]["seeds"] == 3 and found["grpo"]["questions"] == 200
    assert found["grpo"]["accuracy"] == pytest.approx(0.6)
    assert found["grpo"]["others"] == pytest.approx(0.9)
    over = found["grpo"]["differences"]["`sft_continued`"]
    mean, low, high = over["accuracy"]
    assert over["seeds"] == 3 and mean == pytest.approx(0.15) and 0 < low < mean < high
    assert over["others"] == pytest.approx((0, 0, 0))
    none = found["grpo"]["differences"]["none"]
    assert none["seeds"] == 2 and none["accuracy"][0] == pytest.approx(0.5)


def test_sft_goes_on_for_as_long_as_grpo(tmp_path):
    jobs = memory_arms.jobs(
        tmp_path, ["none"], [3], memory_arms.ARMS, tmp_path / "data", rl_iters=7
    )
    base, grpo, sft = jobs[1:]
    assert "--vision-memory" in base.command and flags_of(grpo)["--train-iters"] == "7"
    assert grpo.done in sft.needs and "--train-iters" not in sft.command
    grpo.done.parent.mkdir(parents=True)
    (grpo.done.parent / "results.json").write_text(json.dumps({"seconds": 90.0}))
    assert sft.late() == ("--exit-duration-in-mins", "1.5000") and "--resume" in grpo.late()


def test_the_readme_shows_the_recorded_table():
    rows = json.loads((ROOT / "examples" / "benchmarks" / "memory.json").read_text())
    shown = (ROOT / "examples" / "digits" / "README.md").read_text()
    assert memory_table.markdown(rows) in shown


@pytest.mark.parametrize("command", ["earl", "memory"])
def test_a_table_of_nothing_says_so(command, tmp_path, capsys):
    assert compare_arms.main([command, "--table", "--out", str(tmp_path)]) == 0
    assert "| arm |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compare_arms.main([command, "--jobs", "0"])
    assert sys.exc_info() == (None, None, None)

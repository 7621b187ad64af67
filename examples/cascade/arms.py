"""Jobs of the cascade: SFT, MPO, GSPO and on-policy distillation on digit scenes, and its controls.

`out`/seedN holds, for each seed:

    base/         SFT as in the demo
    mpo/          MPO on right and wrong answers of the base to questions of any form
    sigmoid/      DPO's loss alone on the same pairs
    swapped/      MPO on the same pairs, whose sides are exchanged in one of two
    chosen/       SFT on the right sides: rejection sampling
    mpo_gspo/     GSPO after MPO
    gspo/         GSPO alone for the time that rating, MPO and GSPO after it took
    opd/          from mpo_gspo, teachers: the base where a question says how to answer, else itself
    opd_self/     the same with itself as the teacher of all
    opd_sft/      SFT on the rows of `opd`

Each run ends with answers to all held-out questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.cascade.rows import seconds_file
from examples.digits.jobs import ROOT, Job, digits_data, training
from examples.digits.memory_arms import minutes_of

CASCADE = ROOT / "examples" / "cascade"
ROWS = ("-m", "examples.cascade.rows")
MOST_PAIRS = 3  # of a question
ANSWERS = 8  # of a question, which are rated
FORMS = ("direct", "steps")  # of questions that say how to answer
PAIRED = {  # arm: (config, rows, flags)
    "mpo": ("mpo", "pairs", ()),
    "sigmoid": ("mpo", "pairs", ("--loss-type", "sigmoid")),
    "swapped": ("mpo", "swapped", ()),
    "chosen": ("chosen", "chosen", ()),
}
AFTER = ("opd", "opd_self", "opd_sft")
ARMS = ("base", *PAIRED, "mpo_gspo", "gspo", *AFTER)


@dataclass(frozen=True)
class Size:
    """Questions and steps: those of the comparison, or fewer to try it out; None: the configs'."""

    questions: int = 2000  # of each kind
    images: int = 6000
    pool: int = 3000  # questions that are rated
    iters: int | None = None  # steps of every run


def jobs(out: Path, seeds: Sequence[int], size: Size) -> list[Job]:
    """Returns the jobs, in their order. Files of rows stand beside the scenes."""
    data = out / "data"
    counts = ("--images", str(size.images), "--valid-images", str(max(30, size.questions)))
    made = [digits_data(data, (*counts, "--valid-per-key", str(size.questions)))]
    pool = data / "pool.jsonl"
    command = (*ROWS, "pool", "--data", str(data / "rl.jsonl"), "--rows", str(size.pool))
    made.append(_job(pool, command, [made[0].done]))
    for seed in seeds:
        made += _of_seed(out / f"seed{seed}", data, pool, seed, size)
    return made


def _of_seed(folder: Path, data: Path, pool: Path, seed: int, size: Size) -> list[Job]:
    given = ["--valid-data", str(data / "valid.jsonl"), "--eval-batch-size", "512"]
    given += ["--tokenizer-model", str(data / "tokenizer.model"), "--seed", str(seed)]
    if size.iters is not None:
        given += ["--train-iters", str(size.iters), "--lr-warmup-iters", "0"]
    answered = {name: folder / name / "answers.jsonl" for name in ARMS}
    checkpoint = {name: folder / name / "checkpoint" for name in ARMS}

    def run(name: str, config: Path, start: str, rows: Path, *flags: str, **more) -> Job:
        load = ["--load", str(checkpoint[start]), "--train-data", str(rows)]
        needs = [answered[start], *more.pop("needs", ())]
        return training(config, folder / name, [*given, *load, *flags], needs, **more)

    mixed = ["--train-data", f"{data}/align.jsonl:19200", f"{data}/mix.jsonl"]
    demo = ROOT / "examples" / "digits" / "demo.yaml"
    made = [training(demo, folder / "base", [*given, *mixed], [data / "tokenizer.model"])]
    rows = _rows(data, pool, checkpoint["base"], answered["base"], seed)
    made += rows.values()
    for name, (config, kind, flags) in PAIRED.items():
        done = rows[kind].done
        made.append(run(name, CASCADE / f"{config}.yaml", "base", done, *flags, needs=[done]))
    gspo, rl = CASCADE / "gspo.yaml", data / "rl.jsonl"
    made.append(run("mpo_gspo", gspo, "mpo", rl))

    def minutes() -> float:
        rated = float(seconds_file(rows["rated"].done).read_text()) / 60
        return rated + minutes_of(folder / "mpo") + minutes_of(folder / "mpo_gspo")

    alone = ["--train-iters", "100000"] if size.iters is None else []
    needs = [answered["mpo_gspo"]]
    made.append(run("gspo", gspo, "base", rl, *alone, needs=needs, minutes=minutes))
    mix = data / "mix.jsonl"
    itself = f"={checkpoint['mpo_gspo']}"
    before = [f"{form}={checkpoint['base']}" for form in FORMS]
    teachers = {
        "opd": ["--teacher-load", *before, f"free{itself}"],
        "opd_self": ["--teacher-load", *(f"{form}{itself}" for form in (*FORMS, "free"))],
    }
    for name in AFTER:
        file = CASCADE / ("again.yaml" if name == "opd_sft" else "opd.yaml")
        made.append(run(name, file, "mpo_gspo", mix, *teachers.get(name, ())))
    return made


def _rows(data: Path, pool: Path, checkpoint: Path, answered: Path, seed: int) -> Mapping[str, Job]:
    """The base's own answers to the pool, rated, and the rows that are made of them."""
    where = {name: data / f"seed{seed}_{name}.jsonl" for name in ("rated", "pairs")}
    rate: tuple[str, ...] = ("rate", "--data", str(pool), "--checkpoint", str(checkpoint))
    rate += ("--seed", str(seed))
    rate += ("--reward-funcs", "scorer", "--num-generations", str(ANSWERS))
    rate += ("--max-completion-length", "48")
    pair = (str(ROOT / "tools" / "pass_rate.py"), "pairs", "--data", str(where["rated"]))
    made = {
        "rated": _job(where["rated"], (*ROWS, *rate), [pool, answered]),
        "pairs": _job(where["pairs"], (*pair, "--most", str(MOST_PAIRS)), [where["rated"]]),
    }
    for name in ("swapped", "chosen"):
        command = (*ROWS, name, "--data", str(where["pairs"]), "--seed", str(seed))
        made[name] = _job(data / f"seed{seed}_{name}.jsonl", command, [where["pairs"]])
    return made


def _job(out: Path, command: Sequence[str], needs: Sequence[Path]) -> Job:
    return Job(out, (*command, "--out", str(out)), out.with_suffix(".log"), tuple(needs))

"""Jobs of mimic learning on digit scenes: a larger teacher, a student, and the controls.

All students learn from one teacher, as they would from one that is downloaded, so what is found
holds for this teacher. `out` holds:

    teacher/             the demo's SFT with 16 experts, 6 layers and twice the steps
    skills.json          the teacher's experts by knock-out, and what breaks without them
    routes.st            what the teacher says of all training rows
    seedN/scratch/ARM/   the demo's SFT of a student, from nothing; map.st: by sets of experts
    seedN/tuned/ARM/     400 more steps from scratch/sft; map.st: by transport

Each run ends with answers to all held-out questions. own.st maps the teacher to what its student
has become, by transport; points.json says what was measured on the way and through this map
(`measure.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.digits.earl_arms import LONGEST_WARMUP, PROBED
from examples.digits.jobs import AT_ONCE, DIGITS, ROOT, Job, digits_data, discovery, training
from examples.mimic.measure import KINDS

# The demo's, and a layer more on either side of the look. By depth each layer of the student has
# one of its own kind, on the same side.
PATTERN = "GE*E*ELJGE*E*E"
TEACHER: tuple[str, ...] = ("--num-experts", "16", "--hybrid-layer-pattern", PATTERN)
TEACHER += ("--pipeline-model-parallel-layout", PATTERN)
STEPS = {"scratch": 2200, "tuned": 400}  # of the configs
STEPS_OF_TEACHER, SEED_OF_TEACHER = 4400, 1
PARTS = 20  # of a run, after each of which it is saved
ASKED = 250  # questions of each kind for the teacher's causal test, which all students share

KD = ("--mimic-kd-coeff", "1")
ROUTES = ("--mimic-route-coeff", "0.1")
ARMS = {
    "sft": (),
    "kd": KD,
    "mimic": (*KD, *ROUTES),
    "permuted": (*KD, *ROUTES, "--mimic-map-shuffle-seed", "1"),
    "another_row": (*KD, *ROUTES, "--mimic-row-shuffle-seed", "1"),
    "held": (*KD, *ROUTES, "--mimic-anneal-share", "0"),
}
# From nothing the student's experts are alike until they learn, so `permuted` would only rename
# them. Its first 600 steps are transcription, so what it is taught falls over the whole run.
STARTS = {"scratch": ("sft", "kd", "mimic", "another_row"), "tuned": tuple(ARMS)}
FALLS = {"scratch": ("--mimic-anneal-share", "1"), "tuned": ()}


@dataclass(frozen=True)
class Size:
    """Questions and steps: those of the comparison, or fewer to try it out; None: the configs'."""

    questions: int = 2000  # of each kind
    images: int = 6000
    iters: int | None = None  # steps of every run, a multiple of PARTS

    def steps(self, start: str) -> int:
        """Returns the steps of a run from a start."""
        return self.iters or STEPS[start]

    def flags(self, steps: int) -> list[str]:
        """Returns the flags of a run of so many steps."""
        few = ["--lr-warmup-iters", "0"] if steps <= LONGEST_WARMUP else []
        return ["--train-iters", str(steps), *few]


def jobs(out: Path, seeds: Sequence[int], size: Size) -> list[Job]:
    """Returns the jobs, in their order."""
    data = out / "data"
    counts = ("--images", str(size.images), "--valid-images", str(max(30, size.questions)))
    made = [digits_data(data, (*counts, "--valid-per-key", str(size.questions)))]
    made += _of_teacher(out, data, size)
    for seed in seeds:
        for start in STARTS:
            made += _of_start(out, out / f"seed{seed}", start, data, seed, size)
    return made


def _given(data: Path, seed: int) -> list[str]:
    given = ["--valid-data", str(data / "valid.jsonl"), "--eval-batch-size", "512"]
    given += ["--tokenizer-model", str(data / "tokenizer.model"), "--seed", str(seed)]
    return [*given, *AT_ONCE]


def _mixed(data: Path) -> list[str]:
    return ["--train-data", f"{data}/align.jsonl:19200", f"{data}/mix.jsonl"]


def _of_teacher(out: Path, data: Path, size: Size) -> list[Job]:
    teacher, given = out / "teacher", _given(data, SEED_OF_TEACHER)
    steps = size.flags(size.iters or STEPS_OF_TEACHER)
    checkpoint, needs = teacher / "checkpoint", [teacher / "answers.jsonl"]
    return [
        training(
            DIGITS / "demo.yaml",
            teacher,
            [*given, *_mixed(data), *TEACHER, *steps],
            [data / "tokenizer.model"],
        ),
        discovery(
            checkpoint,
            data,
            out / "skills.json",
            [
                *("--samples", str(PROBED), "--selectivity", str(data / "valid.jsonl")),
                *("--eval-samples", str(ASKED * KINDS), "--eval-batch-size", "512"),
            ],
            needs,
        ),
        _tool(
            "record_routes",
            out / "routes.st",
            ["--checkpoint", str(checkpoint), "--batch-size", "128"],
            [str(data / "align.jsonl"), str(data / "mix.jsonl")],
            needs,
        ),
    ]


def _of_start(out: Path, folder: Path, start: str, data: Path, seed: int, size: Size) -> list[Job]:
    routes, skills, mapped = out / "routes.st", out / "skills.json", folder / start / "map.st"
    given = _given(data, seed)
    base = folder / "scratch" / "sft"
    steps = size.steps(start)
    if start == "scratch":
        config, begins, needs = DIGITS / "demo.yaml", _mixed(data), [data / "tokenizer.model"]
        sets = ["--method", "clusters", "--config", str(config)]
        made = [_tool("map_experts", mapped, [*sets, "--routes", str(routes)], [], [routes])]
    else:
        config, needs = DIGITS / "arms" / "sft_more.yaml", [base / "answers.jsonl"]
        begins = ["--load", str(base / "checkpoint"), "--train-data", f"{data}/mix.jsonl"]
        student = ["--checkpoint", str(base / "checkpoint"), "--samples", str(PROBED)]
        flags = [*student, "--routes", str(routes)]
        made = [
            _tool("map_experts", mapped, flags, [str(data / "mix.jsonl")], [routes, *needs]),
        ]
    for name in STARTS[start]:
        arm, run = ARMS[name], folder / start / name
        files = ["--mimic-routes", str(routes)] if arm else []
        # In `kd` it only measures how far the routers are from the teacher's.
        maps = ROUTES[0] in arm or name == "kd"
        files += ["--mimic-map", str(mapped)] if maps else []
        files += FALLS[start] if ROUTES[0] in arm else ()
        made.append(
            training(
                config,
                run,
                [*given, *begins, *arm, *files, *size.flags(steps)],
                [*needs, *([routes] if arm else []), *([mapped] if maps else [])],
                saves=steps // PARTS,
            )
        )
        answers, own = run / "answers.jsonl", run / "own.st"
        flags = ["--checkpoint", str(run / "checkpoint"), "--samples", str(PROBED)]
        flags += ["--routes", str(routes)]
        made.append(_tool("map_experts", own, flags, [str(data / "mix.jsonl")], [routes, answers]))
        # At once: it deletes most of the run's checkpoints.
        command: tuple[str, ...] = (
            "-m",
            "examples.mimic.measure",
            "--run",
            str(run),
            "--map",
            str(own),
        )
        command += ("--routes", str(routes), "--skills", str(skills), "--data", str(data))
        needed = (answers, own, skills)
        made.append(Job(run / "points.json", command, run / "points.log", needed))
    return made


def _tool(
    name: str, out: Path, flags: Sequence[str], data: Sequence[str], needs: Sequence[Path]
) -> Job:
    files = ("--data", *data) if data else ()
    command = (str(ROOT / "tools" / f"{name}.py"), "--out", str(out), *flags, *files)
    return Job(out, command, out.with_suffix(".log"), tuple(needs))

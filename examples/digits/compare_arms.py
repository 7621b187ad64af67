"""Compare arms on digit scenes: train each from the same checkpoint, ask the same questions.

    python tools/arms.py earl --seeds 1 2 3 --jobs 2              # EARL and its controls
    python tools/arms.py earl --model wide --seeds 1 2 3 --jobs 2 # 32 experts, nine skills
    python tools/arms.py memory --memory clvr none --seeds 1      # what looks may see
    python tools/arms.py cascade --seeds 1 2 3 --jobs 2           # MPO, GSPO, distillation
    python tools/arms.py cascaded_experts --seeds 1 2 3 --jobs 2  # letter C and its controls
    python tools/arms.py mimic --seeds 1 2 3 --jobs 2             # a teacher's routes
    python tools/arms.py looking --seeds 1 2 3 --jobs 2           # answers that look, letter Q

What is finished is not repeated, so a stopped comparison goes on. Each run has one rank; `--jobs`
run side by side. A run that fails stops only those that start from it. The table is made from the
files of the finished runs, and names what is missing; `--table` makes only the table.
`earl --tiers 1` trains only what tells most.

`earl` and `looking` have tables of seeds from several machines: `--keep FOLDER` writes what the
table reads of each seed into a small file there, which counts beside the folders of other seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.cascade import arms as cascade_arms
from examples.cascade import table as cascade_table
from examples.digits import (
    earl_arms,
    earl_runs,
    earl_table,
    hop_arms,
    hop_table,
    memory_arms,
    memory_table,
)
from examples.digits.jobs import Job, run_all
from examples.digits.records import Record, check_not_kept, keep
from examples.looking import arms as looking_arms
from examples.looking import table as looking_table
from examples.mimic import arms as mimic_arms
from examples.mimic import table as mimic_table

Args = argparse.Namespace
COUNTS = {
    "--questions": "of each kind",
    "--images": "for training",
    "--pool": "questions that are rated",
    "--iters": "steps of every run; default the configs'",
    "--base-iters": "steps of the base; default the model's",
    "--sft-iters": "steps of SFT; default the configs'",
    "--rl-iters": "steps of RL; default the configs'",
}


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        counts: numbers that it takes, by their flags, with their defaults.
        options: adds what else it takes.
        jobs: (folder, arguments) -> its jobs.
        summary: folder -> the figures of what is finished; markdown: figures -> tables.
        folder: arguments -> the name of its folder under --out; None: its own name.
        read: the folder of a run -> what the table reads of it; None: it cannot be kept.
    """

    help: str
    counts: dict[str, int | None]
    jobs: Callable[[Path, Args], list[Job]]
    summary: Callable[[Path], Any]
    markdown: Callable[[Any], str]
    options: Callable[[argparse.ArgumentParser], Any] = lambda parser: None
    folder: Callable[[Args], str] | None = None
    read: Callable[[Path], Record] | None = None


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"), help="the demo's")


def _arms(parser: argparse.ArgumentParser, arms: Sequence[str], some: str = "+") -> None:
    parser.add_argument("--arms", nargs=some, choices=arms, default=[*arms])


def _of_earl(parser: argparse.ArgumentParser) -> None:
    tiers = earl_arms.TIERS
    parser.add_argument("--model", choices=earl_arms.MODELS, default="tiny")
    parser.add_argument("--tiers", nargs="+", type=int, choices=tiers, default=[*tiers])


def _of_memory(parser: argparse.ArgumentParser) -> None:
    _arms(parser, memory_arms.ARMS, "*")
    _data(parser)
    parser.add_argument("--memory", nargs="+", choices=memory_arms.MEMORIES, default=["clvr"])


def _of_hops(parser: argparse.ArgumentParser) -> None:
    _arms(parser, [*hop_arms.ARMS])
    _data(parser)


def _earl(out: Path, args: Args) -> list[Job]:
    iters = args.base_iters, args.sft_iters, args.rl_iters
    size = earl_arms.Size(args.questions, args.images, *iters)
    return earl_arms.jobs(out, earl_arms.MODELS[args.model], args.seeds, args.tiers, size)


def _memory(out: Path, args: Args) -> list[Job]:
    iters = args.sft_iters, args.rl_iters
    return memory_arms.jobs(out, args.memory, args.seeds, args.arms, args.data, *iters)


def _cascade(out: Path, args: Args) -> list[Job]:
    size = cascade_arms.Size(args.questions, args.images, args.pool, args.iters)
    return cascade_arms.jobs(out, args.seeds, size)


def _hops(out: Path, args: Args) -> list[Job]:
    return hop_arms.jobs(out, args.seeds, args.arms, args.data, args.iters)


def _mimic(out: Path, args: Args) -> list[Job]:
    size = mimic_arms.Size(args.questions, args.images, args.iters)
    return mimic_arms.jobs(out, args.seeds, size)


def _looking(out: Path, args: Args) -> list[Job]:
    size = looking_arms.Size(args.questions, args.images, args.iters, args.rl_iters)
    return looking_arms.jobs(out, args.seeds, args.arms, size)


SCENES = {"--questions": 2000, "--images": 6000}
COMPARISONS = {
    "earl": Comparison(
        "experts for skills, and reinforcement",
        {**SCENES, "--base-iters": None, "--sft-iters": None, "--rl-iters": None},
        _earl,
        earl_table.summary,
        earl_table.markdown,
        _of_earl,
        folder=lambda args: args.model,
        read=earl_runs.read_run,
    ),
    "memory": Comparison(
        "what a look may see",
        {"--sft-iters": None, "--rl-iters": None},
        _memory,
        memory_table.table,
        memory_table.markdown,
        _of_memory,
    ),
    "cascade": Comparison(
        "preference pairs, RL, distillation",
        {**SCENES, "--pool": 3000, "--iters": None},
        _cascade,
        cascade_table.summary,
        cascade_table.markdown,
    ),
    "cascaded_experts": Comparison(
        "experts that hand tokens on (letter C)",
        {"--iters": None},
        _hops,
        hop_table.table,
        hop_table.markdown,
        _of_hops,
    ),
    "mimic": Comparison(
        "a teacher's routes and answers",
        {**SCENES, "--iters": None},
        _mimic,
        mimic_table.summary,
        mimic_table.markdown,
    ),
    "looking": Comparison(
        "answers that look (letters Q and V)",
        {"--questions": 500, "--images": 3000, "--iters": None, "--rl-iters": None},
        _looking,
        looking_table.summary,
        looking_table.markdown,
        lambda parser: _arms(parser, [*looking_arms.ARMS]),
        read=looking_table.read_run,
    ),
}


def arguments(argv: list[str] | None) -> Args:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, comparison in COMPARISONS.items():
        command = commands.add_parser(name, help=comparison.help)
        command.add_argument("--out", type=Path, default=Path("runs/arms"))
        command.add_argument("--seeds", nargs="+", type=int, default=[1])
        command.add_argument("--jobs", type=int, default=1, help="runs side by side")
        command.add_argument("--table", action="store_true", help="train nothing")
        command.add_argument("--json", type=Path, help="where the table's figures go")
        if comparison.read is not None:
            command.add_argument("--keep", type=Path, help="where each seed's small file goes")
        for count, default in comparison.counts.items():
            command.add_argument(count, type=int, default=default, help=COUNTS[count])
        comparison.options(command)
    args = parser.parse_args(argv)
    for flag in ("--jobs", *COUNTS):
        value = getattr(args, flag[2:].replace("-", "_"), None)
        if value is not None and value < 1:
            parser.error(f"{flag} is {value}; at least 1")
    parts = mimic_arms.PARTS
    if args.command == "mimic" and args.iters is not None and args.iters % parts:
        parser.error(f"--iters is {args.iters}; a multiple of {parts}, after which it is saved")
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 1 if a run failed."""
    args = arguments(argv)
    comparison = COMPARISONS[args.command]
    name = comparison.folder(args) if comparison.folder else args.command
    out = args.out / name
    jobs = [] if args.table else comparison.jobs(out, args)
    check_not_kept(out, [job.done.parent for job in jobs if not job.done.exists()])
    failed = run_all(jobs, args.jobs)
    found = comparison.summary(out)
    print(comparison.markdown(found))
    target = args.json or out / "table.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n")
    if comparison.read is not None and args.keep is not None:
        keep(out, comparison.read, args.keep / name)
    for line in failed:
        print(f"error: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

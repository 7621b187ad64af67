"""Compare arms on digit scenes: train each from the same checkpoint, ask the same questions.

    python tools/arms.py earl --seeds 1 2 3 --jobs 2              # EARL and its controls
    python tools/arms.py earl --model wide --seeds 1 2 3 --jobs 2 # 32 experts, nine skills
    python tools/arms.py memory --memory clvr none --seeds 1      # what looks may see
    python tools/arms.py cascade --seeds 1 2 3 --jobs 2           # MPO, GSPO, distillation
    python tools/arms.py mimic --seeds 1 2 3 --jobs 2             # a teacher's routes

What is finished is not repeated, so a stopped comparison goes on. Each run has one rank; `--jobs`
run side by side. A run that fails stops only those that start from it. The table is made from the
files of the finished runs, and names what is missing; `--table` makes only the table.
`earl --tiers 1` trains only what tells most.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from examples.cascade import arms as cascade_arms
from examples.cascade import table as cascade_table
from examples.digits import earl_arms, earl_table, memory_arms, memory_table
from examples.digits.jobs import run_all
from examples.mimic import arms as mimic_arms
from examples.mimic import table as mimic_table


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    earl = commands.add_parser("earl", help="experts for skills, and reinforcement")
    memory = commands.add_parser("memory", help="what a look may see")
    cascade = commands.add_parser("cascade", help="preference pairs, RL, distillation")
    mimic = commands.add_parser("mimic", help="a teacher's routes and answers")
    for command in (earl, memory, cascade, mimic):
        command.add_argument("--out", type=Path, default=Path("runs/arms"))
        command.add_argument("--seeds", nargs="+", type=int, default=[1])
        command.add_argument("--jobs", type=int, default=1, help="runs side by side")
        command.add_argument("--table", action="store_true", help="train nothing")
        command.add_argument("--json", type=Path, help="where the table's figures go")
    for command in (earl, memory):
        command.add_argument("--rl-iters", type=int, help="steps of RL; default the configs'")
    earl.add_argument("--model", choices=earl_arms.MODELS, default="tiny")
    earl.add_argument("--tiers", nargs="+", type=int, choices=(1, 2, 3), default=[1, 2, 3])
    for command in (earl, cascade, mimic):
        command.add_argument("--questions", type=int, default=2000, help="of each kind")
        command.add_argument("--images", type=int, default=6000, help="for training")
    cascade.add_argument("--pool", type=int, default=3000, help="questions that are rated")
    for command in (cascade, mimic):
        command.add_argument("--iters", type=int, help="steps of every run; default the configs'")
    earl.add_argument("--base-iters", type=int, help="steps of the base; default the model's")
    earl.add_argument("--sft-iters", type=int, help="further steps of SFT; default the configs'")
    memory.add_argument("--arms", nargs="*", choices=memory_arms.ARMS, default=memory_arms.ARMS)
    memory.add_argument("--memory", nargs="+", choices=memory_arms.MEMORIES, default=["clvr"])
    memory.add_argument("--data", type=Path, default=Path("runs/demo/data"), help="the demo's")
    memory.add_argument("--sft-iters", type=int, help="steps of SFT; default the demo's")
    args = parser.parse_args(argv)
    counts = ("jobs", "questions", "images", "base_iters", "sft_iters", "rl_iters", "pool", "iters")
    for name in counts:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; at least 1")
    parts = mimic_arms.PARTS
    if args.command == "mimic" and args.iters is not None and args.iters % parts:
        parser.error(f"--iters is {args.iters}; a multiple of {parts}, after which it is saved")
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 1 if a run failed."""
    args = arguments(argv)
    if args.command == "earl":
        out = args.out / args.model
        iters = (args.base_iters, args.sft_iters, args.rl_iters)
        size = earl_arms.Size(args.questions, args.images, *iters)
        jobs = earl_arms.jobs(out, earl_arms.MODELS[args.model], args.seeds, args.tiers, size)
    elif args.command == "cascade":
        out = args.out / "cascade"
        of = cascade_arms.Size(args.questions, args.images, args.pool, args.iters)
        jobs = cascade_arms.jobs(out, args.seeds, of)
    elif args.command == "mimic":
        out = args.out / "mimic"
        some = mimic_arms.Size(args.questions, args.images, args.iters)
        jobs = mimic_arms.jobs(out, args.seeds, some)
    else:
        out = args.out / "memory"
        iters = (args.sft_iters, args.rl_iters)
        jobs = memory_arms.jobs(out, args.memory, args.seeds, args.arms, args.data, *iters)
    failed = [] if args.table else run_all(jobs, args.jobs)
    found: Any
    if args.command == "earl":
        found = earl_table.summary(out)
        text = earl_table.markdown(found)
    elif args.command == "cascade":
        found = cascade_table.summary(out)
        text = cascade_table.markdown(found)
    elif args.command == "mimic":
        found = mimic_table.summary(out)
        text = mimic_table.markdown(found)
    else:
        found = memory_table.table(out)
        text = memory_table.markdown(found)
    print(text)
    target = args.json or out / "table.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n")
    for line in failed:
        print(f"error: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Measure the speed of this package.

    torchrun ... tools/benchmark.py train|rl --config FILE [any trainer flag] [--json FILE]
    python tools/benchmark.py compare A.json B.json
    torchrun --nproc-per-node 2 tools/benchmark.py scaling [--json FILE]
    python tools/benchmark.py train|rl --against transformers [--json FILE]
    python tools/benchmark.py faults --config FILE [any trainer flag] [--json FILE]
    python tools/benchmark.py dpo|gdn|clvr|looks|convert [--json FILE]

train   throughput of a run on its layout; or against transformers (one rank)
rl      the same for a GRPO run; or completions and steps against transformers and TRL
compare two results of train or rl, if they measured the same work
scaling data- and pipeline-parallel efficiency on two ranks
faults  what faults cost a run on two agents of this machine: goodput, steps lost, time to resume
dpo     steps on preference pairs of text against TRL
gdn     the gated delta rule alone, forward and backward, against transformers
clvr    the cost of looks, and what a short stream with a memory saves
looks   completions that look (letters Q and V) against as many plain tokens
convert Hugging Face folders to checkpoints and back, against a plain copy of the folder
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mm import cli
from megatron_mm.outputs import check_writable, write_json

if TYPE_CHECKING:
    from megatron_mm.config import RunConfig

ROUNDS = {"train": 20, "rl": 8, "dpo": 8, "gdn": 20, "clvr": 20, "looks": 8, "convert": 3,
          "scaling": 10}  # fmt: skip
WARMUP = {"train": 4, "rl": 1, "dpo": 1, "gdn": 4, "clvr": 4, "looks": 1, "convert": 1,
          "scaling": 2}  # fmt: skip
FAULTS = ("kill", "freeze", "slow", "disk", "nan")
MODELS = ("tiny", "small")  # of `models.SHAPES`
DATA, ROUTING = ("real", "mock"), ("natural", "balanced")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ROUNDS:
        command = commands.add_parser(name, allow_abbrev=False)
        command.add_argument("--json", type=Path, help="write the numbers to this file")
        command.add_argument("--rounds", type=int, default=ROUNDS[name], help="timed, per side")
        command.add_argument("--warmup", type=int, default=WARMUP[name], help="untimed rounds")
        if name not in ("train", "rl"):
            command.add_argument("--threads", type=int, default=1)
        if name in ("train", "rl"):
            command.add_argument("--against", choices=["transformers"])
            command.add_argument("--threads", type=int, help="default: 1 against transformers, "
                                 "else torch's")  # fmt: skip
        if name in ("train", "rl", "dpo", "clvr", "looks"):
            command.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
        if name in ("train", "clvr"):
            command.add_argument("--samples", type=int, help="per step; default: by model")
    command = commands.choices["dpo"]
    command.add_argument("--pairs", type=int, help="per step; default: by model")
    command = commands.choices["train"]
    command.add_argument("--data", nargs="+", choices=DATA, help="default: both, if there is data")
    command.add_argument("--routing", nargs="+", choices=ROUTING, help="default: both")
    for name in ("rl", "looks"):
        command = commands.choices[name]
        command.add_argument("--tokens", type=int, default=64, help="per completion")
    command = commands.choices["convert"]
    command.add_argument("--gigabytes", type=float, default=4.2, help="size of the synthetic model")
    command.add_argument("--folder", type=Path, help="working folder; default: a temporary one")
    command = commands.add_parser("faults", allow_abbrev=False)
    command.add_argument("--json", type=Path, help="write the numbers to this file")
    command.add_argument("--kinds", nargs="+", choices=FAULTS, default=["kill"], help="in turn")
    command.add_argument("--every", type=int, default=100, help="steps between two faults")
    command.add_argument("--faults", type=int, default=5, help="how many")
    command.add_argument("--folder", type=Path, help="for logs; default: a temporary one")
    command = commands.add_parser("compare")
    command.add_argument("a", type=Path, metavar="A.json")
    command.add_argument("b", type=Path, metavar="B.json")
    command.add_argument("--json", type=Path, help="where to write the numbers")
    return parser


def _against(args: argparse.Namespace) -> dict[str, Any]:
    """Runs a comparison in one process: with another program, a copy, or a model without looks."""
    import torch

    from megatron_mm.config import ParallelConfig
    from megatron_mm.parallel import groups

    torch.set_num_threads(args.threads or 1)
    from megatron_mm.benchmark import clvr, convert, dpo, gdn, looks, rl, train
    from megatron_mm.benchmark.measure import environment

    result = {"command": args.command, "environment": environment()}
    if args.command == "gdn":
        return result | {"shapes": gdn.compare(args.rounds, args.warmup)}
    groups.start(ParallelConfig())
    try:
        if args.command == "convert":
            found = convert.compare(args.rounds, args.warmup, args.gigabytes, args.folder)
            return result | found
        built = groups.build(ParallelConfig())
        comparisons: dict[str, Callable[..., Any]] = {
            "train": train.compare,
            "clvr": clvr.compare,
            "dpo": dpo.compare,
            "looks": looks.compare,
            "rl": rl.compare,
        }
        compare = comparisons[args.command]
        size = next(getattr(args, n) for n in ("tokens", "samples", "pairs") if hasattr(args, n))
        result["models"] = {
            name: compare(name, built, args.rounds, args.warmup, size) for name in args.models
        }
    finally:
        groups.stop()
    return result


def _check_sides(run: RunConfig, kinds: Sequence[str], routings: Sequence[str]) -> None:
    """Raises ConfigError for sides that cannot be made."""
    from megatron_mm.config import ConfigError
    from megatron_mm.train.sft import plain

    if "real" not in kinds and not plain(run):
        raise ConfigError(
            "--data is mock, but the loss of this run needs rows: its objective is "
            f"{run.training.objective}, or it learns from a map or a teacher; allowed: --data real "
            "mock, where mock data are like the rows"
        )
    if "mock" not in kinds and "balanced" in routings:
        raise ConfigError("--routing balanced needs batches in memory; allowed: --data real mock")


def _throughput(args: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """Measures the run that `flags` describe, on the ranks that torchrun started."""
    import torch

    from megatron_mm.config import ConfigError, load, validate
    from megatron_mm.config.objectives import OBJECTIVES, declaration
    from megatron_mm.config.vision_parallel import decided

    run = load(None, flags)
    generates = args.command == "rl"
    if declaration(run).generates != generates:
        fitting = [name for name, found in OBJECTIVES.items() if found.generates == generates]
        raise ConfigError(
            f"benchmark.py {args.command} is for objective {' or '.join(fitting)}, this run's is "
            f"{run.training.objective}; allowed: benchmark.py {'train' if generates else 'rl'}"
        )
    validate(run, cli.world_size())
    run = decided(run)
    kinds: Sequence[str] = ("real",)
    routings: Sequence[str] = ("natural",)
    if args.command == "train":
        kinds = args.data or (DATA if run.data.train_data else ("mock",))
        routings = args.routing or (ROUTING if "mock" in kinds else ROUTING[:1])
        _check_sides(run, kinds, routings)
    if args.threads:
        torch.set_num_threads(args.threads)
    from megatron_mm.benchmark.measure import environment, revision
    from megatron_mm.benchmark.throughput import measure
    from megatron_mm.engine.kernels import choose_kernels
    from megatron_mm.parallel import groups

    choose_kernels(run)
    groups.start(run.parallel)
    built = groups.build(run.parallel)
    found = measure(
        run,
        built,
        kinds=kinds,
        routings=routings,
        rounds=args.rounds,
        warmup=args.warmup,
    )
    groups.stop()
    named = {"command": args.command, "revision": revision(), "environment": environment()}
    return named | found


def _scaling(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(args.threads)
    from megatron_mm.benchmark import beside, scaling
    from megatron_mm.benchmark.measure import environment
    from megatron_mm.config import ParallelConfig
    from megatron_mm.parallel import groups

    groups.start(ParallelConfig())
    found = scaling.measure(args.rounds, args.warmup)
    found["encoder"] = beside.measure(args.rounds, args.warmup)
    groups.stop()
    return {"command": args.command, "environment": environment()} | found


def _write(result: dict[str, Any], file: Path | None, said: str | None = None) -> None:
    if cli.rank():
        return
    cli.say(json.dumps(result, indent=1) if said is None else said)
    if file:
        write_json(file, result)


def _run(args: argparse.Namespace, flags: list[str]) -> None:
    if args.command == "compare":
        from megatron_mm.benchmark import compare

        found = compare.compare(compare.read(args.a), compare.read(args.b))
        _write(found, args.json, compare.text(found))
        return
    if args.command == "faults":
        from megatron_mm.benchmark import faults

        found = faults.measure(flags, args.kinds, args.every, args.faults, args.folder)
        _write({"command": args.command} | found, args.json, faults.text(found))
        return
    from megatron_mm import platform

    platform.quiet()
    measured = args.command in ("train", "rl") and args.against is None
    if not measured:
        platform.hide_gpus()  # comparisons are of CPUs: the other side is never moved to a GPU
    platform.install()
    if measured:
        from megatron_mm.benchmark import table

        result = _throughput(args, flags)
        _write(result, args.json, table.text(result))
    elif args.command == "scaling":
        from megatron_mm.benchmark import beside, scaling

        result = _scaling(args)
        said = f"{scaling.text(result)}\n{beside.text(result['encoder'])}"
        _write(result, args.json, said)
    else:
        _write(_against(args), args.json)


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, or 1 for an error, which every rank raises."""
    cli.setup_logging(cli.rank())
    parser = _parser()
    args, flags = parser.parse_known_args(argv)
    faults = args.command == "faults"
    named = [flag.partition("=")[0] for flag in flags]
    runs = faults or (args.command in ("train", "rl") and args.against is None)
    if flags and not runs:
        parser.error(f"unknown: {' '.join(flags)}")
    if runs and not {"--config", "--preset"} & set(named):
        parser.error(f"{args.command} needs a run: --config FILE or --preset NAME, or --against")
    if faults and (args.every < 2 or args.faults < 1):
        parser.error(f"--every {args.every} --faults {args.faults}; at least 2 and 1")
    if args.command in ROUNDS and (args.rounds < 1 or args.warmup < 0):
        parser.error(f"--rounds {args.rounds} --warmup {args.warmup}; at least 1 and 0")
    # no notices about missing packages
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from megatron_mm.benchmark.compare import Different
    from megatron_mm.config import ConfigError
    from megatron_mm.errors import CheckpointError, DataError, LaunchError, NonFiniteError

    told = (CheckpointError, ConfigError, DataError, Different, LaunchError, NonFiniteError)
    try:
        if not cli.rank():
            check_writable(args.json, "--json")
        _run(args, flags)
    except told as error:
        cli.fail(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

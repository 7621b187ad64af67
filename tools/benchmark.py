#!/usr/bin/env python
"""Speed of this package: python tools/benchmark.py {train,gdn,clvr,rl,convert} [--json FILE]

train   training steps of the fused model against transformers' (tokens per second, memory)
gdn     the gated delta rule alone, forward and backward, against transformers'
clvr    what looks cost, and what a short stream with a memory saves
rl      completions and steps of GRPO against transformers' and TRL's
convert Hugging Face folders to checkpoints and back, against a plain copy of the folder
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, rounds in (("train", 20), ("gdn", 20), ("clvr", 20), ("rl", 8)):
        command = commands.add_parser(name)
        command.add_argument("--against", choices=["transformers"], default="transformers")
        command.add_argument("--json", type=Path, help="where to write the numbers")
        command.add_argument("--rounds", type=int, default=rounds, help="timed, of each side")
        first = 1 if name == "rl" else 4
        command.add_argument("--warmup", type=int, default=first, help="rounds before them")
        command.add_argument("--threads", type=int, default=1)
        if name != "gdn":
            command.add_argument("--models", nargs="+", default=["tiny", "small"])
        if name in ("train", "clvr"):
            command.add_argument("--samples", type=int, help="per step; default: of the model")
    command.add_argument("--tokens", type=int, default=64, help="of a completion")
    command = commands.add_parser("convert")
    command.add_argument("--json", type=Path, help="where to write the numbers")
    command.add_argument("--rounds", type=int, default=3, help="timed, of each side")
    command.add_argument("--warmup", type=int, default=1, help="rounds before them")
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--gigabytes", type=float, default=4.2, help="of the synthetic model")
    command.add_argument("--folder", type=Path, help="where to work; default: the temporary one")
    return parser


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    from megatron_mm import platform

    platform.quiet()
    platform.install()
    import torch

    from megatron_mm.config import ParallelConfig
    from megatron_mm.parallel import groups

    torch.set_num_threads(args.threads)
    from speed import clvr, convert, gdn, rl, train
    from speed.measure import environment

    result = {"command": args.command, "environment": environment()}
    if args.command == "gdn":
        return result | {"shapes": gdn.compare(args.rounds, args.warmup)}
    groups.start(ParallelConfig())
    try:
        if args.command == "convert":
            found = convert.compare(args.rounds, args.warmup, args.gigabytes, args.folder)
            return result | found
        built = groups.build(ParallelConfig())
        compare = {"train": train.compare, "clvr": clvr.compare, "rl": rl.compare}[args.command]
        size = args.tokens if args.command == "rl" else args.samples
        result["models"] = {
            name: compare(name, built, args.rounds, args.warmup, size) for name in args.models
        }
    finally:
        groups.stop()
    return result


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    # notices about packages that are not there
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    result = json.dumps(_measure(args), indent=1)
    print(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(result + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

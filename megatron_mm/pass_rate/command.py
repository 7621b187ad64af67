"""Measure how often a model answers each row rightly, and choose rows and pairs by it.

    torchrun --nproc-per-node 8 tools/pass_rate.py measure --checkpoint runs/sft \\
        --data rows.jsonl --out rated.jsonl --reward-funcs exact --num-generations 8
    python tools/pass_rate.py keep --data rated.jsonl --between 0.2 0.8 --out kept.jsonl
    python tools/pass_rate.py tiers --data rated.jsonl --edges 0.3 0.7 --out tier.jsonl
    python tools/pass_rate.py pairs --data rated.jsonl --out pairs.jsonl
    torchrun --nproc-per-node 8 tools/pass_rate.py drop-images --checkpoint runs/sft \\
        --data rated.jsonl --out more_pairs.jsonl

`measure` and `drop-images` run the checkpoint's model. Training's flags set the layout, which may
be any, the backend, rewards and sampling; --config takes those of a run's file. They go on where
they were ended. The other commands need no model. Outputs stand beside the data, where the paths of
its images start.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_mm import cli
from megatron_mm.errors import ConfigError, DataError

ROWS_PER_ROUND = 256


def settings(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns (this tool's flags, the run's flags).

    Raises:
        ConfigError: a flag is unknown or out of bounds.
    """
    parser = cli.Parser(__doc__)
    parser.add_argument("command", choices=("measure", "drop-images", *WITHOUT_MODEL))
    parser.add_argument("--data", required=True, help="rows; JSONL, or parquet to be measured")
    parser.add_argument("--out", type=cli.path, required=True, help="the file to write, .jsonl")
    parser.add_argument("--checkpoint", type=cli.path, help="of the model that answers")
    parser.add_argument(
        "--rows-per-round", type=int, help=f"rows between two writes; default {ROWS_PER_ROUND}"
    )
    parser.add_argument(
        "--between", type=float, nargs=2, metavar=("LOW", "HIGH"), help="accuracies to keep"
    )
    parser.add_argument(
        "--edges", type=float, nargs="+", help="accuracies between tiers, ascending"
    )
    parser.add_argument(
        "--most", type=int, help="pairs of a row; default 15, or 1 by dropped images"
    )
    parser.add_argument(
        "--unfinished", action="store_true", default=None, help="pair answers cut at the limit too"
    )
    parser.add_argument("--columns", nargs="+", help="further keys of the rows that pairs keep")
    args, rest = parser.parse_known_args(argv)
    wanted = FLAGS[args.command]
    for name in sorted({name for names in FLAGS.values() for name in names}):
        if getattr(args, name) is not None and name not in wanted:
            raise ConfigError(
                f"{cli.flag(name)} is not for {args.command}; allowed: --data, --out, "
                f"{', '.join(map(cli.flag, wanted))}"
            )
        if getattr(args, name) is None and name in NEEDED and name in wanted:
            raise ConfigError(f"{args.command} needs {cli.flag(name)}")
    for name in ("rows_per_round", "most"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"{cli.flag(name)} is {value}; allowed: 1 or more")
    if args.out.suffix != ".jsonl":
        raise ConfigError(f"--out is {args.out}; allowed: a name that ends in .jsonl")
    if rest and args.command in WITHOUT_MODEL:
        raise ConfigError(f"{rest[0]} is not for {args.command}, which needs no model")
    return args, rest


def _keep(args: argparse.Namespace) -> str:
    from megatron_mm.pass_rate.choose import keep

    return keep(Path(args.data), args.out, *args.between)


def _tiers(args: argparse.Namespace) -> str:
    from megatron_mm.pass_rate.choose import tiers

    return tiers(Path(args.data), args.out, args.edges)


def _pairs(args: argparse.Namespace) -> str:
    from megatron_mm.pass_rate.pairs import MOST, write_pairs

    most, columns = args.most or MOST, args.columns or ()
    return write_pairs(Path(args.data), args.out, most, bool(args.unfinished), columns)


WITHOUT_MODEL: dict[str, Callable[[argparse.Namespace], str]] = {
    "keep": _keep,
    "tiers": _tiers,
    "pairs": _pairs,
}
FLAGS: dict[str, Sequence[str]] = {
    "measure": ("checkpoint", "rows_per_round"),
    "drop-images": ("checkpoint", "rows_per_round", "most", "unfinished"),
    "keep": ("between",),
    "tiers": ("edges",),
    "pairs": ("most", "unfinished", "columns"),
}
NEEDED = ("checkpoint", "between", "edges")


def main(argv: list[str]) -> int:
    """Returns the exit code: 0; 1 if a checkpoint, rows or rewards cannot be used; 2 for wrong
    settings."""
    cli.setup_logging(cli.rank())
    try:
        args, rest = settings(argv)
        if args.command in WITHOUT_MODEL:
            cli.say(WITHOUT_MODEL[args.command](args))
            return 0
    except (ConfigError, DataError) as error:
        return cli.fail(error)
    return _with_model(args, rest)


def _with_model(args: argparse.Namespace, rest: list[str]) -> int:
    from megatron_mm.checkpoint.command import CheckpointCommand

    with CheckpointCommand() as command:  # before megatron-core is imported, which warns
        from megatron_mm.checkpoint import sharded
        from megatron_mm.data.tokenizer import load_tokenizer
        from megatron_mm.earl.knock_out import stamps
        from megatron_mm.pass_rate.measure import measure, told
        from megatron_mm.pass_rate.runs import key_of, run_of_flags
        from megatron_mm.pass_rate.without_images import drop_images
        from megatron_mm.pass_rate.without_images import told as told_of_pairs

        path, stored = command.resolve(args.checkpoint)
        scores = args.command == "measure"
        run = run_of_flags(stored["config"], rest, cli.world_size(), scores=scores)
        tokenizer = load_tokenizer(run.data.tokenizer_model, run.data.end_tokens)
        engine = command.engine(run)
        sharded.load(engine, path, finetune=True)
        per_round = args.rows_per_round or ROWS_PER_ROUND
        most, unfinished = args.most or 1, bool(args.unfinished)
        of_pairs = () if scores else (most, unfinished)
        key = key_of(run, args.command, stamps(str(path)), stamps(args.data), *of_pairs)
        if scores:
            said = told(measure(engine, tokenizer, args.data, args.out, key, per_round))
        else:
            tally = drop_images(
                engine,
                tokenizer,
                args.data,
                args.out,
                key,
                per_round,
                most=most,
                unfinished=unfinished,
            )
            said = told_of_pairs(tally)
        if cli.rank() == 0:
            cli.say(f"{args.out}: {said}")
    return command.status

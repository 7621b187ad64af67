"""Record a teacher's routes and next tokens for rows of data, as mimic learning reads them.

    python tools/record_routes.py --checkpoint runs/teacher --data train.jsonl --out routes.st
    torchrun --nproc-per-node 8 tools/record_routes.py --checkpoint runs/teacher \\
        --data train.jsonl --out routes.st --tensor-model-parallel-size 8
    python tools/record_routes.py --hf QWEN3_NEXT --data train.jsonl --out routes.st \\
        --layers 8 16 24

The teacher reads the rows with their own answers. Of every token of an answer the likeliest experts
of the chosen layers are written, and the likeliest next tokens. A checkpoint is one of ours, and
training's flags set its layout, the backend and --tokenizer-model; --hf is the folder of any
transformers model with experts, which runs on the CPU of this process. Training finds a row by the
name of its file and its number, and refuses it if its text is another.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_mm import cli
from megatron_mm.config import ConfigError
from megatron_mm.earl.stored_run import check_flags, stored_run

TOP, ANSWERS = 16, 64


def settings(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns (this tool's flags, the run's flags).

    Raises:
        ConfigError: a flag is unknown or out of bounds.
    """
    parser = cli.Parser(__doc__)
    parser.add_argument("--checkpoint", type=cli.path, help="of ours")
    parser.add_argument("--hf", type=cli.path, help="a folder that transformers loads")
    parser.add_argument(
        "--data", nargs="+", required=True, help="files of rows with answers; JSONL or parquet"
    )
    parser.add_argument("--out", type=cli.path, required=True, help="the file to write")
    parser.add_argument("--layers", type=int, nargs="+", help="layers of experts; default: all")
    parser.add_argument(
        "--top", type=int, help=f"experts of a token and layer; default: {TOP}, or all if fewer"
    )
    parser.add_argument(
        "--answers", type=int, help=f"next tokens of a token; default: {ANSWERS}; 0: none"
    )
    parser.add_argument("--samples", type=int, help="at most this many rows; default: all")
    parser.add_argument("--batch-size", type=int, help="rows read together; default: 16")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the folder's code")
    args, rest = parser.parse_known_args(argv)
    if (args.checkpoint is None) == (args.hf is None):
        raise ConfigError("give one of --checkpoint and --hf: the teacher")
    for name, least in {"top": 1, "answers": 0, "samples": 1, "batch_size": 1}.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"{cli.flag(name)} is {value}; allowed: {least} or more")
    if args.layers is not None and sorted({*args.layers}) != args.layers:
        raise ConfigError(f"--layers is {args.layers}; allowed: different layers, ascending")
    if args.trust_remote_code and args.hf is None:
        raise ConfigError("--trust-remote-code is for --hf")
    if args.batch_size is not None and args.hf is not None:
        raise ConfigError(
            f"--batch-size is {args.batch_size}; allowed with --hf: left out, it is 1"
        )
    if args.hf is None:
        check_flags(rest, "recording")
    elif cli.world_size() > 1:
        raise ConfigError(f"{cli.world_size()} ranks; allowed with --hf: 1")
    return args, rest


def main(argv: list[str]) -> int:
    """Returns the exit code: 0; 1 if teacher or data cannot be used; 2 for wrong settings."""
    from megatron_mm.checkpoint.command import CheckpointCommand

    with CheckpointCommand() as command:
        args, rest = settings(argv)
        if args.hf is not None:
            said = _of_folder(args, rest)
        else:
            said = _of_checkpoint(args, rest, command)
        if cli.rank() == 0:
            cli.say(said)
    return command.status


def _of_checkpoint(args: argparse.Namespace, rest: list[str], command: Any) -> str:
    from megatron_mm.checkpoint import sharded
    from megatron_mm.config import effective_pattern, hops, num_layers
    from megatron_mm.data.tokenizer import load_tokenizer
    from megatron_mm.engine.feed import raise_together
    from megatron_mm.errors import DataError
    from megatron_mm.mimic.record import check_top, record
    from megatron_mm.mimic.recorded import TeacherSizes, write_routes
    from megatron_mm.mimic.rounds import BATCH_SIZE, Rows
    from megatron_mm.mimic.route_spool import RouteSpool

    path, stored = command.resolve(args.checkpoint)
    run = stored_run(stored["config"], rest, cli.world_size(), None)
    pattern, language = effective_pattern(run.model), run.model.language
    known = [*hops(run.model)]
    layers = known if args.layers is None else args.layers
    top = min(TOP, language.num_experts) if args.top is None else args.top
    check_top(layers, known, top, language.num_experts)
    tokenizer = load_tokenizer(run.data.tokenizer_model, run.data.end_tokens)
    engine = command.engine(run)
    out, error, found = Path(args.out), None, None
    if cli.rank() == 0:
        try:
            found = RouteSpool(out)  # better refused now than after hours
        except DataError as problem:
            error = str(problem)
    raise_together(engine.groups, error)
    sharded.load(engine, path, finetune=True)
    rows = Rows(args.data, args.samples, args.batch_size or BATCH_SIZE)
    answers = _answers(args, tokenizer.vocab_size)
    keep = None if found is None else found.add
    record(engine, tokenizer, rows, layers, top, answers, keep)
    if found is not None:
        sizes = num_layers(pattern), language.num_experts, language.vocab_size
        try:
            teacher = TeacherSizes(stored["identity"], *sizes)
            write_routes(out, teacher, layers, found, str(path))
        except DataError as problem:
            error = str(problem)
    raise_together(engine.groups, error)
    return _told(args, found, layers, top)


def _of_folder(args: argparse.Namespace, rest: list[str]) -> str:
    from megatron_mm.config import load
    from megatron_mm.mimic.record_hf import TransformersTeacher, record_hf
    from megatron_mm.mimic.recorded import write_routes
    from megatron_mm.mimic.rounds import Rows
    from megatron_mm.mimic.route_spool import RouteSpool

    folder, out, data = Path(args.hf), Path(args.out), load(None, rest).data
    found = RouteSpool(out)
    teacher = TransformersTeacher(folder, data, trust_remote_code=args.trust_remote_code)
    answers = _answers(args, teacher.tokenizer.vocab_size)
    rows = Rows(args.data, args.samples)
    sizes, layers = record_hf(teacher, rows, args.layers, args.top, answers, TOP, found.add)
    write_routes(out, sizes, layers, found, str(folder))
    return _told(args, found, layers, next(iter(found.values())).experts.shape[2])


def _answers(args: argparse.Namespace, vocabulary: int) -> int:
    return min(ANSWERS if args.answers is None else args.answers, vocabulary)


def _told(args: argparse.Namespace, found: Any, layers: list[int], top: int) -> str:
    rows = 0 if found is None else len(found)  # known to rank 0, which says it
    return f"written: {args.out}, {rows} rows, {len(layers)} layers, {top} experts of each"

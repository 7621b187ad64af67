"""Plan memory, FLOPs, traffic and speed of a run on any number of GPUs, without having one.

    python tools/plan.py --config examples/mm-80b.yaml --world-size 1024 --gpu H100
    python tools/plan.py search --preset mm-80b --world-size 1024 --gpu H100

Every flag of the trainer is accepted too. Without --config the run is in bf16 with as many samples
per step as GPUs, unless flags say otherwise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_mm import cli
from megatron_mm.config import ConfigError, RunConfig, load
from megatron_mm.config.flags import parse_flags
from megatron_mm.errors import RLError
from megatron_mm.outputs import check_writable, write_json
from megatron_mm.perf.hardware import GPU, Assumptions, gpu


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/plan.py",
        usage="%(prog)s [search] --world-size N [--gpu NAME] [flags of the trainer]",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument("--world-size", type=int, required=True, help="number of GPUs")
    parser.add_argument("--gpu", default="H100", help="H100, H200, B200 or GB200 (default: H100)")
    parser.add_argument("--images", type=int, default=1, help="per sample (default: 1)")
    parser.add_argument(
        "--supervised", type=float, default=1.0, help="share of text in the loss (default: 1)"
    )
    parser.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="in place of an assumption: compute, bandwidth, links, launch, wait or reserved",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the pipeline to FILE")
    parser.add_argument("--top", type=int, default=5, help="search: layouts shown (default: 5)")
    return parser


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, or 2 for wrong settings or a layout that does not fit."""
    cli.setup_logging(cli.rank())
    searching = argv[:1] == ["search"]
    args, rest = _parser().parse_known_args(argv[1:] if searching else argv)
    from megatron_mm import platform

    platform.quiet()
    platform.hide_gpus()  # a plan's tensors have no memory, and NCCL no ranks that do not run
    platform.install()
    try:
        _check(args)
        run = _with_defaults(load(None, rest), rest, args.world_size)
        act = _search if searching else _plan
        return act(args, run, gpu(args.gpu), Assumptions.given(args.assume))
    except (ConfigError, RLError) as error:
        return cli.fail(error)


def _check(args: argparse.Namespace) -> None:
    """Raises ConfigError for what would stop the command only when it is done, or make no sense."""
    from megatron_mm.perf.assumed import check_content
    from megatron_mm.perf.chart import check_format

    check_content(args.images, args.supervised)
    for name in ("world_size", "top"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} is {getattr(args, name)}; allowed: 1 or more")
    check_format(args.chart)
    check_writable(args.json, "--json")
    check_writable(args.chart, "--chart")


def _with_defaults(run: RunConfig, rest: list[str], world_size: int) -> RunConfig:
    """Sets precision and batch size where a preset, which is only a model, leaves them open."""
    flags = parse_flags(rest)
    given = {path[-1] for path in flags.values}
    if flags.config is None and "bf16" not in given:
        run.training.bf16 = True
    if flags.config is None and "global_batch_size" not in given:
        run.training.global_batch_size = world_size * run.training.micro_batch_size
    return run


def _plan(args: argparse.Namespace, run: RunConfig, device: GPU, assumed: Assumptions) -> int:
    from tqdm import tqdm

    from megatron_mm.perf import chart, layout, table

    ranks = run.parallel.pipeline_model_parallel_size
    with tqdm(total=ranks, unit="rank", disable=not sys.stderr.isatty()) as bar:
        plan = layout.plan_layout(
            run, args.world_size, device, assumed, args.images, args.supervised, bar.update
        )
    notes = table.assumptions(plan, args.images, args.supervised)
    cli.say(table.table(plan, notes))
    if args.json:
        write_json(args.json, table.as_dict(plan, notes))
    if args.chart:
        chart.draw(plan, args.chart)
    if not plan.fits:
        raise layout.too_large(plan)
    return 0


def _search(args: argparse.Namespace, run: RunConfig, device: GPU, assumed: Assumptions) -> int:
    from tqdm import tqdm

    from megatron_mm.perf import table
    from megatron_mm.perf.search import search

    with tqdm(unit="step", disable=not sys.stderr.isatty()) as bar:
        found = search(
            run, args.world_size, device, assumed, args.images, args.supervised, args.top, bar
        )
    content = args.images, args.supervised
    notes = table.assumptions(found.plans[0], *content, micro_batch=False)
    cli.say(table.ranking(found.plans, found.considered, found.fitting))
    cli.say("\n".join(["assumed:", *(f"- {note}" for note in notes)]))
    if args.json:
        layouts = [table.as_dict(p, table.assumptions(p, *content)) for p in found.plans]
        write_json(args.json, {"layouts": layouts})
    return 0

"""Memory, FLOPs, traffic and predicted speed of a run on any number of GPUs, without one.

    python tools/plan.py --config examples/mm-80b.yaml --world-size 1024 --gpu H100
    python tools/plan.py search --preset mm-80b --world-size 1024 --gpu H100

Every flag of the trainer holds here too. Without --config it is a run in bf16 with as many samples
a step as GPUs, unless flags say otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # planned on the CPU, whatever is here

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/plan.py",
        usage="%(prog)s [search] --world-size N [--gpu NAME] [flags of the trainer]",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument("--world-size", type=int, required=True, help="how many GPUs")
    parser.add_argument("--gpu", default="H100", help="H100, H200, B200 or GB200 (default: H100)")
    parser.add_argument("--images", type=int, default=1, help="in every sample (default: 1)")
    parser.add_argument(
        "--supervised", type=float, default=1.0, help="share of text in the loss (default: 1)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the pipeline there")
    parser.add_argument("--top", type=int, default=5, help="search: layouts shown (default: 5)")
    return parser


def main(argv: list[str]) -> int:
    searching = argv[:1] == ["search"]
    args, rest = _parser().parse_known_args(argv[1:] if searching else argv)
    from megatron_mm import platform
    from megatron_mm.config import ConfigError, load

    platform.quiet()
    platform.install()
    from megatron_mm.perf import hardware

    try:
        run = _with_defaults(load(None, rest), rest, args.world_size)
        gpu, assumed = hardware.gpu(args.gpu), hardware.Assumptions()
        return (_search if searching else _plan)(args, run, gpu, assumed)
    except ConfigError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2


def _with_defaults(run, rest: list[str], world_size: int):
    """A preset is a model; what it is trained with, that training needs, is left to say."""
    from megatron_mm.config.flags import parse_flags

    flags = parse_flags(rest)
    given = {path[-1] for path in flags.values}
    if flags.config is None and "bf16" not in given:
        run.training.bf16 = True
    if flags.config is None and "global_batch_size" not in given:
        run.training.global_batch_size = world_size * run.training.micro_batch_size
    return run


def _plan(args: argparse.Namespace, run, gpu, assumed) -> int:
    from tqdm import tqdm

    from megatron_mm.perf import chart, layout
    from megatron_mm.perf import table as report

    ranks = run.parallel.pipeline_model_parallel_size
    with tqdm(total=ranks, unit="rank", disable=not sys.stderr.isatty()) as bar:
        plan = layout.plan_layout(
            run, args.world_size, gpu, assumed, args.images, args.supervised, bar.update
        )
    notes = report.assumptions(plan, args.images, args.supervised)
    print(report.table(plan, notes))
    if args.json:
        _write(args.json, report.as_dict(plan, notes))
    if args.chart:
        args.chart.parent.mkdir(parents=True, exist_ok=True)
        chart.draw(plan, args.chart)
    if not plan.fits:
        raise layout.too_large(plan)
    return 0


def _search(args: argparse.Namespace, run, gpu, assumed) -> int:
    from tqdm import tqdm

    from megatron_mm.perf import table as report
    from megatron_mm.perf.search import search

    with tqdm(unit="step", disable=not sys.stderr.isatty()) as bar:
        found = search(
            run, args.world_size, gpu, assumed, args.images, args.supervised, args.top, bar
        )
    notes = report.assumptions(found.plans[0], args.images, args.supervised)
    print(report.ranking(found.plans, found.considered, found.fitting))
    print("assumed:", *(f"- {note}" for note in notes), sep="\n")
    if args.json:
        _write(args.json, {"layouts": [report.as_dict(plan, notes) for plan in found.plans]})
    return 0


def _write(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Compare arms on the digit scenes: train each from the same checkpoint, ask the same questions.

    python tools/arms.py --out runs/arms --seeds 1 2 3
    python tools/arms.py --out runs/arms --arms grpo earl --memory clvr none --seeds 1 --jobs 2

For every memory and seed, one model is trained (`demo.yaml`, on the scenes of runs/demo/data) and
its experts are discovered. Each arm (`examples/digits/arms/*.yaml`) continues from it, and its
effect on these experts is measured. Finished parts are not repeated, so a stopped comparison can be
resumed. The table is made from the runs' files; `--table` makes only the table. `sft_continued`
trains for as long as `grpo` of the same memory and seed, so keep the load of the machine even. A
run has one rank, because so small a model is no faster on two; `--jobs` memories and seeds run in
parallel.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]

DIGITS = ROOT / "examples" / "digits"
DATA = Path("runs/demo/data")  # as in the configs
ASKED = 960  # questions of the causal test, asked once per skill
ARMS = ("grpo", "sft_continued", "earl", "earl_shuffled", "earl_scalar")  # grpo sets the time
# Memory of the looks, and three controls: keys without position, a memory no richer than the
# stream, and another scene in the memory.
MEMORIES = {
    "clvr": (),
    "none": ("--vision-memory", "none"),
    "no_coordinates": ("--no-memory-coordinates",),
    "thumbnail": ("--vision-memory", "thumbnail"),
    "another": ("--memory-images", "other_images"),
}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/arms"))
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--memory", nargs="+", choices=MEMORIES, default=["clvr"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--jobs", type=int, default=1, help="memories and seeds side by side")
    parser.add_argument("--sft-iters", type=int, help="steps before the arms; default the demo's")
    parser.add_argument("--rl-iters", type=int, help="steps of every arm; default the configs'")
    parser.add_argument("--table", action="store_true", help="make the table, train nothing")
    return parser.parse_args(argv)


def run(command: list[str], log: Path) -> None:
    """Runs a command.

    Raises:
        SystemExit: it failed; names the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{log.parent}: {' '.join(command[-6:])}", flush=True)
    with log.open("w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        code = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
    if code:
        lines = log.read_text().splitlines()
        said = next((line for line in lines if line.startswith("error:")), f"status {code}")
        raise SystemExit(f"{log}: {said}")


def one_stage() -> list[str]:
    """Returns flags for the demo's layers without pipeline stages."""
    layout = yaml.safe_load((DIGITS / "demo.yaml").read_text())["parallel"]
    layers = layout["pipeline_model_parallel_layout"].replace("|", "").replace(" ", "")
    return ["--pipeline-model-parallel-size", "1", "--pipeline-model-parallel-layout", layers]


def train(config: Path, folder: Path, flags: list[str]) -> None:
    """Trains on one rank, unless it is done."""
    if (folder / "results.json").exists():
        return
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    run(
        [*launch, "-m", "megatron_mm.train", "--config", str(config), "--output-dir", str(folder)]
        + ["--wandb-mode", "disabled", "--no-report", *one_stage(), *flags],
        folder / "train.log",
    )


def discover(checkpoint: Path, out: Path, flags: list[str]) -> None:
    """Discovers experts, unless it is done."""
    if out.exists():
        return
    tool = [sys.executable, str(ROOT / "tools" / "discover_experts.py"), "--samples=2000"]
    tool += ["--checkpoint", str(checkpoint), "--data", str(DATA / "mix.jsonl")]
    part = out.with_name(f"part_{out.name}")
    run([*tool, "--out", str(part), *flags], out.with_suffix(".log"))
    for suffix in (".png", ".json"):  # the picture first, because `out` marks completion
        part.with_suffix(suffix).rename(out.with_suffix(suffix))


def compare(args: argparse.Namespace, memory: str, seed: int) -> None:
    """Trains and measures all arms of one memory and seed."""
    folder = args.out / memory / f"seed{seed}"
    given = [*MEMORIES[memory], "--seed", str(seed)]
    base, skill_map = folder / "sft", folder / "map.json"
    iters = [] if args.sft_iters is None else ["--train-iters", str(args.sft_iters)]
    train(DIGITS / "demo.yaml", base, [*given, *iters, "--save", str(base / "checkpoint")])
    discover(base / "checkpoint", skill_map, [])
    measured = ["--skill-map", str(skill_map), "--selectivity", str(DATA / "valid.jsonl")]
    measured += ["--eval-samples", str(ASKED)]
    discover(base / "checkpoint", base / "experts.json", measured)
    for arm in [name for name in ARMS if name in args.arms]:
        flags = [*given, "--load", str(base / "checkpoint")]
        flags += ["--save", str(folder / arm / "checkpoint")]
        if arm.startswith("earl"):
            flags += ["--skill-map", str(skill_map)]
        if arm == "sft_continued":
            grpo = folder / "grpo" / "results.json"
            if not grpo.exists():
                raise SystemExit(f"{grpo} is missing: sft_continued takes as long as grpo; run it")
            minutes = json.loads(grpo.read_text())["seconds"] / 60
            flags += ["--exit-duration-in-mins", f"{minutes:.4f}"]
        elif args.rl_iters is not None:
            flags += ["--train-iters", str(args.rl_iters)]
        train(DIGITS / "arms" / f"{arm}.yaml", folder / arm, flags)
        discover(folder / arm / "checkpoint", folder / arm / "experts.json", measured)


def main(argv: list[str] | None = None) -> None:
    from examples.digits.arms_table import markdown, table

    args = arguments(argv)
    if not args.table:
        if not (DATA / "rl.jsonl").exists():
            make = f"python tools/make_digits.py --out {DATA} --jitter 1"
            raise SystemExit(f"{DATA}: no digit scenes; {make}")
        with ThreadPoolExecutor(args.jobs) as pool:
            pairs = [(memory, seed) for memory in args.memory for seed in args.seeds]
            started = [pool.submit(compare, args, *pair) for pair in pairs]
            done, waiting = wait(started, return_when=FIRST_EXCEPTION)
            for job in waiting:  # jobs beside a failed one still finish
                job.cancel()
            for problem in filter(None, (job.exception() for job in done)):
                print(f"stopping: {problem}", file=sys.stderr)
                raise problem
    rows = table(args.out)
    print(markdown(rows))
    (args.out / "table.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Find which experts serve which skill, and write the map that EARL rewards.

    python tools/discover_experts.py --checkpoint runs/sft --data probe.jsonl --out map.json
    torchrun --nproc-per-node 8 tools/discover_experts.py --checkpoint runs/sft \\
        --data probe.jsonl --out map.json --tensor-model-parallel-size 2 \\
        --pipeline-model-parallel-size 4

The model reads rows with their own answers. The experts that labelled spans were routed to, given
the token, become clusters; comparing two halves of the rows shows how far the clusters exceed
chance. The command writes the map and, beside it, a picture of the same name.
`--selectivity VALID.jsonl` also asks questions with each skill's cluster forbidden.
`--skill-map MAP` measures the clusters of that map, from an earlier state of the model, in place
of finding new ones. The model is the checkpoint's. Training's flags set the layout, which may be
any, the backend (--transformer-impl and the like), --tokenizer-model, --eval-samples,
--eval-batch-size and --max-new-tokens.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from megatron_mm import cli
from megatron_mm.config import (
    ConfigError,
    RunConfig,
    TrainingConfig,
    data_parallel_size,
    load,
    run_of_checkpoint,
    validate,
)
from megatron_mm.config.flags import parse_flags
from megatron_mm.config.settings import CheckpointConfig

logger = logging.getLogger(__name__)

# Settings of the run that may be given beside the layout and the backend.
GIVEN = ("tokenizer_model", "eval_samples", "eval_batch_size", "max_new_tokens")


def settings(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns (this tool's flags, the run's flags).

    Raises:
        ConfigError: a flag is unknown or out of bounds.
    """
    parser = cli.Parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", required=True, help="rows with answers; JSONL or parquet")
    parser.add_argument("--out", type=Path, required=True, help="the map to write, .json")
    parser.add_argument("--labeller", default="clauses", help="clauses, whole or a dotted path")
    parser.add_argument("--samples", type=int, help="at most this many rows; default: all")
    parser.add_argument("--batch-size", type=int, default=16, help="rows read together")
    parser.add_argument(
        "--cluster-size", type=int, default=2, help="at most this many experts per layer"
    )
    parser.add_argument("--min-lift", type=float, default=1.1)
    parser.add_argument("--seed", type=int, default=1, help="for the order of rows")
    parser.add_argument("--skill-map", type=Path, help="measure this map, find no new one")
    parser.add_argument("--selectivity", metavar="FILE", help="questions for the causal test")
    args, rest = parser.parse_known_args(argv)
    for name, least in (("samples", 2), ("batch_size", 1), ("cluster_size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"{cli.flag(name)} is {value}; allowed: {least} or more")
    if not args.min_lift > 1:
        raise ConfigError(f"--min-lift is {args.min_lift:g}; allowed: more than 1, the base rate")
    if args.out.suffix != ".json":
        raise ConfigError(f"--out is {args.out}; allowed: a name that ends in .json")
    for path in parse_flags(rest).values:
        if path[0] not in ("parallel", "backend") and path[-1] not in GIVEN:
            raise ConfigError(
                f"{cli.flag(path[-1])} is not for discovering; allowed: this tool's flags, the "
                f"layout, the backend and {', '.join(map(cli.flag, GIVEN))}"
            )
    return args, rest


def probed_run(stored: dict, args: argparse.Namespace, rest: list[str], world: int) -> RunConfig:
    """Returns the run that made the checkpoint, with the layout and settings given here.

    Raises:
        ConfigError: the settings do not fit.
    """
    given = load(None, rest)
    stored = {key: value for key, value in stored.items() if key not in ("backend", "rl")}
    run = run_of_checkpoint(stored)
    training = TrainingConfig(
        bf16=run.training.bf16, global_batch_size=data_parallel_size(given, world)
    )
    named = {path[-1]: value for path, value in parse_flags(rest).values.items()}
    data = replace(run.data, train_data=[], valid_data=args.selectivity)
    run = replace(
        run,
        parallel=given.parallel,
        backend=given.backend,
        training=training,
        objectives=RunConfig().objectives,
        checkpoint=CheckpointConfig(),
        data=replace(data, **{k: v for k, v in named.items() if hasattr(data, k)}),
        evaluation=replace(
            run.evaluation, **{k: v for k, v in named.items() if hasattr(run.evaluation, k)}
        ),
    )
    validate(run, world)
    return run


def table(found, causal: dict | None) -> list[str]:
    """Returns a line for each skill, and one for the agreement of the two halves."""
    head = f"{'skill':<14} {'positions':>9} {'experts/layer':>13} {'lift':>6} {'hits':>6}"
    head += f" {'chance':>6}"
    if causal:
        head += f" {'accuracy':>9} {'without':>8} {'selectivity':>11}"
    lines = [head]
    for skill, row in found.rows.items():
        line = f"{skill:<14} {row['positions']:>9} {row['experts']:>13.1f} {row['lift']:>6.2f}"
        line += f" {row['hit']:>6.2f} {row['chance']:>6.2f}"
        if causal and skill in causal["without"]:
            own = causal["without"][skill][skill]
            line += f" {causal['accuracy'][skill]:>9.3f} {own:>8.3f}"
            line += f" {causal['selectivity'][skill]:>11.3f}"
        lines.append(line)
    agree = found.skill_map.info["stability"]
    lines.append(
        f"two halves agree: Jaccard {agree['jaccard']:.2f}, chance {agree['chance']:.2f}, "
        f"z {agree['z']:.1f}"
    )
    return lines


def main(argv: list[str]) -> int:
    """Returns the exit code: 0; 1 if checkpoint, data or routes cannot be used; 2 for wrong
    settings."""
    from megatron_mm.checkpoint import sharded
    from megatron_mm.checkpoint.command import CheckpointCommand
    from megatron_mm.data.tokenizer import load_tokenizer
    from megatron_mm.earl.discovery import probe_and_discover
    from megatron_mm.earl.probe import Probe
    from megatron_mm.earl.skill_map import load_skill_map

    with CheckpointCommand() as command:
        args, rest = settings(argv)
        path, stored = command.resolve(args.checkpoint)
        run = probed_run(stored["config"], args, rest, cli.world_size())
        tokenizer = load_tokenizer(run.data.tokenizer_model, run.data.end_tokens)
        engine = command.engine(run)
        sharded.load(engine, path, finetune=True)
        given = None
        if args.skill_map is not None:
            language = run.model.language
            sizes = (engine.config.num_layers, language.num_experts, language.moe_router_topk)
            given = load_skill_map(args.skill_map, *sizes)
        probe = Probe(args.data, args.labeller, args.samples, args.batch_size, args.seed)
        found, causal = probe_and_discover(
            engine,
            tokenizer,
            probe,
            args.out,
            cluster_size=args.cluster_size,
            min_lift=args.min_lift,
            info={"checkpoint": str(path)},
            selectivity=args.selectivity is not None,
            given=given,
        )
        if found.warning:
            logger.warning("%s", found.warning)
        if cli.rank() == 0:
            cli.say("\n".join(table(found, causal)))
            for skill in found.skill_map.info["without_cluster"]:
                cli.say(f"left out: {skill} has no expert of lift {args.min_lift:g}")
            cli.say(f"written: {args.out}, {args.out.with_suffix('.png')}")
    return command.status

"""Find which experts serve which skill, and write the map that EARL rewards.

    python tools/discover_experts.py --checkpoint runs/sft --data probe.jsonl --out map.json
    torchrun --nproc-per-node 8 tools/discover_experts.py --checkpoint runs/sft \\
        --data probe.jsonl --out map.json --tensor-model-parallel-size 2 \\
        --pipeline-model-parallel-size 4

The model reads rows with their own answers, once with all experts and once without each: the
experts that a skill's right spans miss most become its own, those that other tokens use most become
common. Comparing two halves of the rows shows how far this exceeds chance. The command writes the
map and, beside it, a picture and the sums, from which an interrupted measurement goes on.
`--method random` draws each skill's experts, and reads the rows once. `--method lift` groups the
experts that labelled spans are routed to, given the token; clusters may then overlap, and none is
common.
`--selectivity VALID.jsonl` also asks questions with each skill's cluster forbidden.
`--skill-map MAP` measures the clusters of that map, from an earlier state of the model, in place
of finding new ones. The model is the checkpoint's. Training's flags set the layout, which may be
any, the backend (--transformer-impl and the like), --tokenizer-model, --eval-samples,
--eval-batch-size and --max-new-tokens.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from megatron_mm import cli
from megatron_mm.config import ConfigError
from megatron_mm.earl.stored_run import check_flags, stored_run

logger = logging.getLogger(__name__)

# Flags of one method only.
OF_METHOD = {
    "knock-out": ("cluster_size", "common_size", "passes"),
    "lift": ("cluster_size", "min_lift"),
    "random": ("cluster_size", "common_size"),
}
METHODS = tuple(OF_METHOD)


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
    parser.add_argument("--method", choices=METHODS, default="knock-out")
    parser.add_argument(
        "--cluster-size",
        type=int,
        help="experts of a skill in a layer; default: a token's, or as many as there are for each "
        "skill; with lift at most 2",
    )
    parser.add_argument(
        "--common-size", type=int, help="common experts of a layer; default: as many as a token's"
    )
    parser.add_argument(
        "--passes",
        type=int,
        help="remove random sets of experts in as many passes over the rows; default: each expert "
        "on its own",
    )
    parser.add_argument("--min-lift", type=float, help="with lift; default: 1.1")
    parser.add_argument(
        "--seed", type=int, default=1, help="of the order of rows, of sets, and of a draw"
    )
    parser.add_argument("--skill-map", type=Path, help="measure this map, find no new one")
    parser.add_argument("--selectivity", metavar="FILE", help="questions for the causal test")
    args, rest = parser.parse_known_args(argv)
    least_of = {"samples": 2, "batch_size": 1, "cluster_size": 1, "common_size": 1, "passes": 1}
    for name, least in least_of.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"{cli.flag(name)} is {value}; allowed: {least} or more")
    used = "measuring a map" if args.skill_map is not None else args.method
    for name in ("cluster_size", "common_size", "passes", "min_lift"):
        if getattr(args, name) is not None and name not in OF_METHOD.get(used, ()):
            raise ConfigError(
                f"{cli.flag(name)} is not for {used}; allowed: "
                f"{', '.join(map(cli.flag, OF_METHOD.get(used, ()))) or 'none such'}"
            )
    if args.min_lift is not None and not args.min_lift > 1:
        raise ConfigError(f"--min-lift is {args.min_lift:g}; allowed: more than 1, the base rate")
    if args.out.suffix != ".json":
        raise ConfigError(f"--out is {args.out}; allowed: a name that ends in .json")
    check_flags(rest, "discovering")
    return args, rest


def table(found, causal: dict | None) -> list[str]:
    """Returns a line for each skill, and one for the agreement of the two halves.

    After a knock-out, `own` and `others` are nats per token: how much worse this skill and the
    others are read without one of its experts, which were chosen on other rows. Beside an
    `accuracy`, they are what this skill and the others lose of it without the whole cluster.
    """
    head = f"{'skill':<14} {'positions':>9} {'experts/layer':>13} {'lift':>6} {'hits':>6}"
    head += f" {'chance':>6}"
    if found.knocked_out:
        head += f" {'own':>7} {'others':>7}"
    if causal:
        head += f" {'accuracy':>9} {'own':>7} {'others':>7}"
    lines = [head]
    for skill, row in found.rows.items():
        line = f"{skill:<14} {row['positions']:>9} {row['experts']:>13.1f} {row['lift']:>6.2f}"
        line += f" {row['hit']:>6.2f} {row['chance']:>6.2f}"
        if found.knocked_out and "own" in row:
            line += f" {row['own']:>7.3f} {row['others']:>7.3f}"
        if causal and skill in causal["without"]:
            line += f" {causal['accuracy'][skill]:>9.3f} {causal['own'][skill]:>7.3f}"
            line += f" {causal['others'][skill]:>7.3f}"
        lines.append(line)
    info = found.skill_map.info
    if "stability" in info:
        agree = info["stability"]
        lines.append(
            f"two halves agree: Jaccard {agree['jaccard']:.2f}, chance {agree['chance']:.2f}, "
            f"z {agree['z']:.1f}"
        )
    return lines


def method(args: argparse.Namespace, engine):
    """Returns the method of `discovery.probe_and_discover` that the flags ask for.

    Raises:
        RLError: for a map that cannot be used.
    """
    from megatron_mm.earl.discovery import AtRandom, ByKnockOut, ByLift
    from megatron_mm.earl.skill_map import load_skill_map

    if args.skill_map is not None:
        language = engine.run.model.language
        sizes = engine.config.num_layers, language.num_experts, language.moe_router_topk
        return load_skill_map(args.skill_map, *sizes)
    kind = {"knock-out": ByKnockOut, "lift": ByLift, "random": AtRandom}[args.method]
    given = {name: getattr(args, name) for name in OF_METHOD[args.method]}
    return kind(**{name: value for name, value in given.items() if value is not None})


def main(argv: list[str]) -> int:
    """Returns the exit code: 0; 1 if checkpoint, data or routes cannot be used; 2 for wrong
    settings."""
    from megatron_mm.checkpoint.command import CheckpointCommand

    with CheckpointCommand() as command:  # before megatron-core is imported
        from megatron_mm.checkpoint import sharded
        from megatron_mm.data.tokenizer import load_tokenizer
        from megatron_mm.earl.discovery import probe_and_discover
        from megatron_mm.earl.probe import Probe

        args, rest = settings(argv)
        path, stored = command.resolve(args.checkpoint)
        run = stored_run(stored["config"], rest, cli.world_size(), args.selectivity)
        tokenizer = load_tokenizer(run.data.tokenizer_model, run.data.end_tokens)
        engine = command.engine(run)
        sharded.load(engine, path, finetune=True)
        probe = Probe(args.data, args.labeller, args.samples, args.batch_size, args.seed)
        found, causal = probe_and_discover(
            engine,
            tokenizer,
            probe,
            args.out,
            method(args, engine),
            checkpoint=path,
            selectivity=args.selectivity is not None,
        )
        if found.warning:
            logger.warning("%s", found.warning)
        if cli.rank() == 0:
            cli.say("\n".join(table(found, causal)))
            info = found.skill_map.info
            missing = f"expert of lift {info['min_lift']:g}" if "min_lift" in info else "right span"
            for skill in info.get("without_cluster", ()):
                cli.say(f"left out: {skill} has no {missing}")
            cli.say(f"written: {args.out}, {args.out.with_suffix('.png')}")
    return command.status

"""Keep a task's experts: a smaller checkpoint, and how well it answers beside the whole model.

    python tools/prune_experts.py --checkpoint runs/sft --skill-map map.json --skills spatial \\
        --out runs/spatial --hf-out runs/spatial-hf --valid valid.jsonl
    torchrun --nproc-per-node 8 tools/prune_experts.py --checkpoint runs/sft \\
        --skill-map map.json --skills spatial count --keep 128 --out runs/two \\
        --valid valid.jsonl --tensor-model-parallel-size 2 --expert-model-parallel-size 4

In every layer the clusters of the named skills and the common cluster stay, filled up to `--keep`
experts by what breaks without them, or by use where the map does not know. A token takes as many
experts as before. The result holds weights only: a run with its number of experts starts from it
with `--finetune --load`. `--valid` asks the questions of a file before and after; the figures go
into pruning.json and the report beside the checkpoint. Training's flags set the layout, which may
be any, the backend, --tokenizer-model, --eval-samples, --eval-batch-size and --max-new-tokens.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_mm import cli
from megatron_mm.config import ConfigError, RunConfig, effective_pattern, num_layers, validate
from megatron_mm.earl.stored_run import check_flags, stored_run


def settings(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns (this tool's flags, the run's flags).

    Raises:
        ConfigError: a flag is unknown or its value is not allowed.
    """
    parser = cli.Parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--skill-map", type=Path, required=True)
    parser.add_argument("--skills", nargs="+", required=True, help="those of the task")
    parser.add_argument(
        "--keep", type=int, help="experts of a layer; default: those of the clusters"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the new checkpoint")
    parser.add_argument("--hf-out", type=Path, help="folder for transformers; must not exist")
    parser.add_argument("--assets", type=Path, help="its tokenizer and processor files")
    parser.add_argument("--valid", metavar="FILE", help="questions, asked before and after")
    args, rest = parser.parse_known_args(argv)
    check_flags(rest, "pruning")
    if args.hf_out is not None and args.hf_out.exists():
        raise ConfigError(f"--hf-out is {args.hf_out}, which exists; allowed: a new folder")
    if args.assets is not None and args.hf_out is None:
        raise ConfigError("--assets is given without --hf-out; allowed: both")
    return args, rest


def table(before: dict, after: dict, experts: tuple[int, int]) -> list[str]:
    """Returns a line for each kind of question.

    Args:
        before, after: results of `evaluate`; experts: how many a layer has before and after.
    """
    heads = [f"of {experts[0]}", f"of {experts[1]}"]
    lines = [f"{'kind':<20} {'n':>6} {'chance':>7} {heads[0]:>8} {heads[1]:>8} {'change':>7}"]
    for kind, one in before.items():
        a, b = one["accuracy"], after[kind]["accuracy"]
        line = f"{kind:<20} {one['n']:>6} {one['chance']:>7.3f} {a:>8.3f} {b:>8.3f}"
        lines.append(f"{line} {b - a:>+7.3f}")
    return lines


def answered(command: Any, run: RunConfig, path: Path) -> dict:
    """Returns the accuracy of a checkpoint's model by kind of question. Every rank calls it."""
    from megatron_mm.checkpoint import sharded
    from megatron_mm.data.tokenizer import load_tokenizer
    from megatron_mm.evaluation.evaluate import evaluate

    tokenizer = load_tokenizer(run.data.tokenizer_model, run.data.end_tokens)
    engine = command.engine(run)
    sharded.load(engine, path, finetune=True)
    results, _ = evaluate(engine, tokenizer)
    del engine
    gc.collect()  # its cycles would hold one model while the next is built
    return results


def main(argv: list[str]) -> int:
    """Returns the exit code: 0; 1 if checkpoint, map or questions cannot be used; 2 for wrong
    settings."""
    from megatron_mm.checkpoint.command import CheckpointCommand

    with CheckpointCommand() as command:  # before megatron-core is imported
        from megatron_mm.checkpoint.collective import raising_together
        from megatron_mm.checkpoint.folders import check_unused
        from megatron_mm.convert import to_hf
        from megatron_mm.convert.commands.job import patient_group
        from megatron_mm.convert.folder import travelling
        from megatron_mm.convert.summary import listed
        from megatron_mm.earl.prune import choose, pruned_model, write_pruned
        from megatron_mm.earl.skill_map import load_skill_map
        from megatron_mm.errors import CheckpointError
        from megatron_mm.evaluation.evaluate import write_record
        from megatron_mm.report.page import report_or_warn
        from megatron_mm.report.page_experts import PRUNING_FILE

        args, rest = settings(argv)
        path, stored = command.resolve(args.checkpoint)
        run = stored_run(stored["config"], rest, cli.world_size(), args.valid)
        experts, layers = run.model.language.num_experts, num_layers(effective_pattern(run.model))
        sizes = layers, experts, run.model.language.moe_router_topk
        choice = choose(load_skill_map(args.skill_map, *sizes), args.skills, args.keep)
        smaller = replace(run, model=pruned_model(run.model, choice.count))
        validate(smaller, cli.world_size())
        groups = command.start(run)
        with raising_together(groups.world, f"cannot prune {args.checkpoint}"):
            check_unused(args.out, stored["iteration"])
            checkpoint = to_hf.open_checkpoint(path)
            assets = None if args.assets is None else travelling(args.assets)
            if assets == []:
                raise CheckpointError(f"{args.assets} holds no tokenizer and no processor")
        record: dict[str, Any] = {
            "checkpoint": str(path),
            "skill_map": str(args.skill_map),
            "skills": args.skills,
            "num_experts": experts,
            "kept": choice.count,
            "filled_by": choice.filled_by,
            "experts": choice.experts,
        }
        before = answered(command, run, path) if args.valid else {}
        group = patient_group()
        made, left_out = write_pruned(checkpoint, choice, args.out, run.parallel, record, group)
        lines = [f"kept: {choice.count} of {experts} experts in each of {layers} layers"]
        lines += listed("left out", left_out)
        if args.hf_out is not None:
            lines += to_hf.convert(to_hf.open_checkpoint(made), args.hf_out, group, assets=assets)
        if args.valid:
            after = answered(command, smaller, made)
            record |= {"valid_data": args.valid, "before": before, "after": after}
            lines += table(before, after, (experts, choice.count))
        write_record(groups, args.out / PRUNING_FILE, record)
        if cli.rank() == 0:
            cli.say("\n".join(lines))
            written = [made, args.out / PRUNING_FILE, *report_or_warn(args.out)]
            written += [] if args.hf_out is None else [args.hf_out]
            cli.say(f"written: {', '.join(map(str, written))}")
    return command.status

"""Convert a Hugging Face folder to a megatron checkpoint; no value changes.

    python tools/hf_to_megatron.py --hf DIR --out DIR
    torchrun --nproc-per-node 8 tools/hf_to_megatron.py --hf LANGUAGE --hf-vision VISION \\
        --out DIR --tensor-model-parallel-size 4 --expert-model-parallel-size 8
    python tools/hf_to_megatron.py --hf DIR --out DIR --dry-run

`--hf` takes a folder of any language family, alone or fused with an encoder (model/families). Two
folders start a fusion: the projector is new. So are the looks and glimpses that
`--hybrid-layer-pattern` adds to a folder, and the second hop where it has C for E. New parameters
are drawn from `--seed` and named in the output. The checkpoint loads on any layout (`--finetune
--load DIR`); the layout flags are checked against the model's sizes and recorded. A dry run writes
nothing and needs no weights: config.json is enough.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from megatron_mm import cli
from megatron_mm.config import (
    ConfigError,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    base_pattern,
    data_parallel_size,
    from_dict,
    moved_pairs,
    to_dict,
    validate,
)
from megatron_mm.config.flags import add_plugins, parse_flags
from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.config.load import import_plugins
from megatron_mm.config.tree import merge

logger = logging.getLogger(__name__)


def target_run(model: ModelConfig, argv: list[str]) -> RunConfig:
    """Returns the folder's model with what the flags add, on the layout of the flags.

    Raises:
        ConfigError: a flag sets something else, or the sizes do not fit.
    """
    tree = to_dict(RunConfig(model=model))
    flags = parse_flags(argv)
    for line in flags.accepted:
        logger.info("%s", line)
    sides = LAYERS.of_role("side")
    for path, value in flags.values.items():
        known = path[:2] in (("model", "fusion"), ("model", "layers"))
        known |= path[-1] in ("hybrid_layer_pattern", "seed")
        if path[0] != "parallel" and not known:
            raise ConfigError(
                f"{cli.flag(path[-1])} is not for converting; allowed: the layout, --seed, "
                "--hybrid-layer-pattern, settings of its letters and how images enter"
            )
        for key in reversed(path):
            value = {key: value}
        tree = merge(tree, value)
    run = from_dict(RunConfig, tree)
    pattern = base_pattern(run.model.hybrid_layer_pattern)
    if pattern != base_pattern(model.hybrid_layer_pattern):
        raise ConfigError(
            f"--hybrid-layer-pattern has the layers {pattern}, the folder's model "
            f"{base_pattern(model.hybrid_layer_pattern)}; allowed: the same with "
            f"{', '.join(sides)} between, and C for E"
        )
    moved = moved_pairs(model.hybrid_layer_pattern, run.model.hybrid_layer_pattern)
    if moved:
        raise ConfigError(
            f"--hybrid-layer-pattern gives the folder's weights to another pair: {moved[0]}; "
            "allowed: new pairs behind the folder's"
        )
    p = run.parallel
    dense = p.tensor_model_parallel_size * p.context_parallel_size
    etp = p.expert_tensor_parallel_size or p.tensor_model_parallel_size
    experts = etp * p.expert_model_parallel_size
    world = p.pipeline_model_parallel_size * math.lcm(dense, experts)
    batch = data_parallel_size(run, world) * p.pipeline_model_parallel_size
    run.training = replace(run.training, global_batch_size=batch)
    validate(run, world)
    run.training = TrainingConfig(seed=run.training.seed)
    return run


def main(argv: list[str]) -> int:
    """Returns the exit code: 0; 1 if a folder cannot be read or written; 2 for wrong settings."""
    cli.setup_logging(cli.rank())
    from megatron_mm import platform

    platform.quiet()
    platform.hide_gpus()  # it computes nothing, and may have more ranks than GPUs
    platform.install()

    from megatron_mm.checkpoint.collective import raising_together
    from megatron_mm.convert import summary, to_megatron
    from megatron_mm.convert.commands.job import DTYPES, run_job
    from megatron_mm.convert.folder import check_folder, has_weights, open_folder
    from megatron_mm.errors import CheckpointError
    from megatron_mm.model.blueprint import blueprint

    parser = cli.Parser(__doc__)
    add_plugins(parser)
    parser.add_argument("--hf", type=cli.path, required=True)
    parser.add_argument("--hf-vision", type=cli.path)
    parser.add_argument("--out", type=cli.path, required=True)
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: as in the folder")
    parser.add_argument("--dry-run", action="store_true")

    def work(group) -> list[str]:
        args, rest = parser.parse_known_args(argv)
        import_plugins(args.plugins)
        dtype = DTYPES.get(args.dtype)
        folders = [args.hf] if args.hf_vision is None else [args.hf, args.hf_vision]
        with raising_together(group, f"cannot convert {args.hf}"):
            weights = not args.dry_run or any(has_weights(folder) for folder in folders)
            source = open_folder(args.hf, args.hf_vision, weights=weights)
        run = target_run(source.model, rest)
        run.plugins = args.plugins
        source.model = run.model
        parameters = blueprint(run.model)
        if not weights:
            return summary.expected_lines(source, parameters, args.hf_vision is not None)
        mapping = source.mapping(parameters)
        lines = summary.mapping_lines(source, mapping, dtype)
        if args.dry_run:
            if mapping.problem():
                cli.say("\n".join(lines))
                raise CheckpointError(f"{args.hf}: {mapping.problem()}")
            return [*lines, "dry run: nothing was written"]
        with raising_together(group, f"cannot convert {args.hf}"):
            check_folder(source, mapping)
        run.training.bf16 = to_megatron.dtype_of(source, mapping, dtype) == DTYPES["bf16"]
        made = to_megatron.convert(source, mapping, parameters, run, args.out, group, dtype=dtype)
        return [*lines, f"converted: {made}"]

    return run_job(work)

"""Merge LoRA adapters into the weights beside them and write a plain checkpoint.

    python tools/merge_lora.py --load runs/adapted --save runs/merged
    torchrun --nproc-per-node 8 tools/merge_lora.py --load runs/adapted --save runs/merged \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4

The checkpoint describes the model and its adapters; training's flags set the layout, which may be
any. W + alpha / r * B A (Hu et al. 2021, eq. 3) is summed in fp32 and rounded once to the weights'
precision. The result holds weights only: a run starts from it with `--finetune --load`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_mm import cli
from megatron_mm.config import (
    ConfigError,
    RunConfig,
    load,
    run_of_checkpoint,
    validate,
)
from megatron_mm.config.flags import parse_flags
from megatron_mm.config.untrained import untrained


def settings(argv: list[str]) -> RunConfig:
    """Returns a run that says where to load, where to save, and the layout.

    Raises:
        ConfigError: another setting is given, or one of these is missing.
    """
    for path in parse_flags(argv).values:
        if path[0] not in ("parallel", "plugins") and path[-1] not in ("load", "save"):
            raise ConfigError(
                f"{cli.flag(path[-1])} is not for merging; allowed: --load, --save, --plugins and "
                "the layout"
            )
    run = load(None, argv)
    for key in ("load", "save"):
        if not getattr(run.checkpoint, key):
            raise ConfigError(f"{key} is none; allowed: the folder of a checkpoint")
    return run


def stored_run(path: Path, stored: dict, given: RunConfig, world_size: int) -> RunConfig:
    """Returns the run that made the checkpoint at `path`, on the layout of `given`.

    Raises:
        ConfigError: it has no adapters, would be overwritten, or does not fit the layout.
    """
    # Parameters do not depend on the backend, and nothing is computed here.
    stored = {key: value for key, value in stored.items() if key != "backend"}
    run = replace(run_of_checkpoint(stored), parallel=given.parallel)
    if run.lora.lora_rank is None:
        raise ConfigError(f"{path} has no adapters: nothing to merge")
    save = given.checkpoint.save
    assert save is not None  # `settings` has refused a run without it
    if Path(save).resolve() in (path.resolve(), path.resolve().parent):
        raise ConfigError(
            f"save is {save}, which would overwrite what is merged; "
            "allowed: another folder than load"
        )
    validate(untrained(run, world_size), world_size)
    return run


def main(argv: list[str]) -> int:
    """Returns the exit code: 0; 1 if a checkpoint cannot be read or written; 2 for wrong
    settings."""
    from megatron_mm.checkpoint.command import CheckpointCommand

    with CheckpointCommand() as command:  # before megatron-core is imported
        from megatron_mm.checkpoint.merge import merge_adapters

        given = settings(argv)
        source, target = given.checkpoint.load, given.checkpoint.save
        assert source is not None and target is not None  # `settings` has refused a run without
        path, stored = command.resolve(source)
        engine = command.engine(stored_run(path, stored["config"], given, cli.world_size()))
        merged = merge_adapters(engine, path, Path(target))
        if cli.rank() == 0:
            cli.say(f"merged: {merged}")
    return command.status

"""Merge LoRA adapters into the weights beside them and write a plain checkpoint.

    python tools/merge_lora.py --load runs/adapted --save runs/merged
    torchrun --nproc-per-node 8 tools/merge_lora.py --load runs/adapted --save runs/merged \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4

The model and its adapters are those that the checkpoint describes; the layout may be any,
in training's flags. W + alpha / r * B A is summed in fp32 and rounded once to the weights'
precision. The result holds weights only: a run starts from it with `--finetune --load`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

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


def settings(argv: list[str]) -> RunConfig:
    """Where to load, where to save, the layout. Raises ConfigError for any other setting."""
    for path in parse_flags(argv).values:
        if path[0] != "parallel" and path[-1] not in ("load", "save"):
            flag = "--" + path[-1].replace("_", "-")
            raise ConfigError(f"{flag} is not for merging; allowed: --load, --save and the layout")
    run = load(None, argv)
    for key in ("load", "save"):
        if not getattr(run.checkpoint, key):
            raise ConfigError(f"{key} is none; allowed: the folder of a checkpoint")
    return run


def stored_run(path: Path, stored: dict, given: RunConfig, world_size: int) -> RunConfig:
    """The run that made the checkpoint at `path`, on the layout of `given`.

    Raises ConfigError if it has no adapters, would be overwritten, or does not fit the layout.
    """
    # The same parameters under any backend, and nothing is computed here.
    stored = {key: value for key, value in stored.items() if key != "backend"}
    run = replace(run_of_checkpoint(stored), parallel=given.parallel)
    if run.lora.lora_rank is None:
        raise ConfigError(f"{path} has no adapters: nothing to merge")
    if Path(given.checkpoint.save).resolve() in (path.resolve(), path.resolve().parent):
        raise ConfigError(
            f"save is {given.checkpoint.save}, which would overwrite what is merged; "
            "allowed: another folder than load"
        )
    # Nothing is trained: how long and on what batches it was says nothing about this layout.
    training = TrainingConfig(global_batch_size=data_parallel_size(run, world_size))
    data = replace(run.data, train_data=[])
    validate(replace(run, data=data, training=training), world_size)
    return run


def main(argv: list[str]) -> int:
    """Exit status: 0; 1 if the checkpoint cannot be read or written; 2 for wrong settings."""
    rank, world_size = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    from megatron_mm import platform

    platform.quiet()
    platform.install()

    from megatron_mm.checkpoint import folders
    from megatron_mm.checkpoint.merge import merge_adapters
    from megatron_mm.engine.engine import Engine
    from megatron_mm.errors import CheckpointError
    from megatron_mm.parallel import groups

    started, status = False, 0
    try:
        given = settings(argv)
        try:
            path, stored = folders.resolve(Path(given.checkpoint.load))
        except CheckpointError as error:
            raise CheckpointError(f"cannot load {given.checkpoint.load}: {error}") from None
        run = stored_run(path, stored["config"], given, world_size)
        groups.start(run.parallel)
        started = True
        engine = Engine.create(run, groups.build(run.parallel))
        merged = merge_adapters(engine, path, Path(given.checkpoint.save))
        if rank == 0:
            print(f"merged: {merged}")
    except (CheckpointError, ConfigError) as error:
        # These are raised on every rank alike, so one of them speaks.
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        status = 2 if isinstance(error, ConfigError) else 1
    if started:
        groups.stop()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

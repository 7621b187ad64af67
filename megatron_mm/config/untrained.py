"""A run whose model is used and not trained, on any layout."""

from __future__ import annotations

from dataclasses import replace

from megatron_mm.config.checks import data_parallel_size
from megatron_mm.config.settings import OptimizerConfig, RunConfig, TrainingConfig


def untrained(run: RunConfig, world_size: int) -> RunConfig:
    """Returns the run without what only training reads, for commands that compute with a stored
    model: its batches, schedules, objective and data need not fit their layout, nor be there.

    Raises:
        ConfigError: the layout does not divide the ranks.
    """
    parallel = run.parallel
    # Virtual stages want a microbatch for each pipeline rank.
    batch = data_parallel_size(run, world_size) * parallel.pipeline_model_parallel_size
    training = TrainingConfig(
        bf16=run.training.bf16, seed=run.training.seed, global_batch_size=batch
    )
    return replace(
        run,
        training=training,
        optimizer=OptimizerConfig(),
        objectives=RunConfig().objectives,
        data=replace(run.data, train_data=[]),
        evaluation=replace(run.evaluation, eval_interval=None),
    )

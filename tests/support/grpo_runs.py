"""Runs of reinforcement learning on a model that has learnt nothing, for several tests."""

from __future__ import annotations

import multiprocessing
import zlib

import torch

from megatron_mm.config import RunConfig, validate
from megatron_mm.parallel import groups
from megatron_mm.parallel.param_layout import layouts
from megatron_mm.train.trainer import Trainer
from support.trainers import digits_run

TOKENS = 10


def grpo_run(scenes, **settings) -> RunConfig:
    """Two steps a rollout; completions are rewarded for even token ids."""
    defaults = dict(
        objective="grpo",
        global_batch_size=16,
        micro_batch_size=2,
        num_generations=4,
        rollout_batch_size=8,
        max_completion_length=TOKENS,
        reward_funcs=["support.even.even"],
        reward_num_workers=1,
        train_iters=4,
        lr=1e-5,
        valid_data=None,
    )
    return digits_run(scenes, **(defaults | settings))


def randomise(trainer: Trainer) -> None:
    """Weights at which every part of the model has a say, alike on every layout."""
    for name, param, layout in layouts(*trainer.engine.chunks):
        if param.dim() > 1:
            seed = zlib.crc32(name.encode())
            whole = torch.randn(layout.global_shape, generator=torch.Generator().manual_seed(seed))
            scale = 1.0 if name == "embedding.weight" else layout.global_shape[-1] ** -0.5
            layout.held(param.data).copy_(whole[layout.block] * scale)
    trainer.engine.optimizer.reload_model_params()


def trainer_of(run: RunConfig) -> Trainer:
    """In a job that has built no groups yet. Close its source."""
    validate(run, torch.distributed.get_world_size())
    # The pool's ranks are daemons, which may not start reward workers.
    multiprocessing.current_process()._config["daemon"] = False
    trainer = Trainer(run, groups.build(run.parallel))
    if not run.checkpoint.load:
        randomise(trainer)
    return trainer


def step_of(trainer: Trainer) -> dict:
    """One step's metrics but times, and the table of completions."""
    metrics = trainer.step()
    found = {k: v for k, v in metrics.items() if "time" not in k and "timing" not in k}
    return found | {"table": trainer.source.table}


def on_rank_steps(run: RunConfig, steps: int) -> list[dict]:
    trainer = trainer_of(run)
    try:
        return [step_of(trainer) for _ in range(steps)]
    finally:
        trainer.source.close()

"""Engines that train on random microbatches, and whole tensors gathered from their ranks."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_mm.checkpoint import sharded
from megatron_mm.checkpoint.optimizer_state import KINDS, collect
from megatron_mm.config import ParallelConfig, RunConfig, token_multiple
from megatron_mm.engine.engine import Engine
from megatron_mm.parallel import groups
from megatron_mm.parallel.param_layout import layouts
from megatron_mm.train.sft import SupervisedFineTuning
from support.batches import microbatch, small_run
from support.gathering import at_rank_0

PATTERN = "GE L *E J"
MICROBATCHES = ((1, 0, 2), (0, 0))  # of one step; the second has no image


def tiny_run(parallel: dict | None = None, pattern: str = PATTERN, **training) -> RunConfig:
    """`parallel` in short names (tp, pp, ep, etp) or ParallelConfig's own."""
    names = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "ep": "expert_model_parallel_size",
        "etp": "expert_tensor_parallel_size",
    }
    run = small_run(pattern)
    run.parallel = ParallelConfig(**{names.get(k, k): v for k, v in (parallel or {}).items()})
    run.optimizer.lr, run.optimizer.lr_warmup_iters = 1e-2, 2
    for key, value in training.items():
        setattr(run.training, key, value)
    return run


def create(run: RunConfig, made: groups.Groups | None = None) -> Engine:
    return Engine.create(run, made or groups.build(run.parallel))


def train(engine: Engine, steps, images_of=MICROBATCHES) -> list[float]:
    """One optimizer step for each number in `steps`, on microbatches drawn from it.

    Returns:
        The mean loss per supervised token before each step, on every rank.
    """
    pg, losses = engine.groups.pg, []
    for step in steps:
        batches = [
            microbatch(engine.run.model, 10 * step + i, images, token_multiple(engine.run))
            for i, images in enumerate(images_of)
        ]
        mine = batches[pg.dp.rank() :: pg.dp.size()]
        parts = engine.forward_backward(mine, SupervisedFineTuning())
        total = torch.zeros(2, dtype=torch.float64)
        for metrics in parts:
            total += metrics.pair("train/lm_loss")
        dist.all_reduce(total, group=engine.groups.world)
        losses.append(float(total[0] / total[1]))
        engine.update(engine.gradient_norm())
        # What augmentation or sampling would do to the generators.
        torch.rand(3), np.random.rand(), random.random()
    return losses


def scramble() -> None:
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)


def whole(engine: Engine) -> dict[str, torch.Tensor]:
    """Every weight, moment and main parameter as a whole tensor, on rank 0; else {}.

    Asserts that copies are equal to the bit and that nothing is missing.
    """
    state = collect(engine)
    mine = {}
    for name, param, layout in layouts(*engine.chunks):
        values = {"weight": param.detach().clone(), **state.get(name, {})}
        for kind in ("weight", *KINDS):
            if kind in values:
                block = layout.held(values[kind].float())
                mine[f"{kind}.{name}"] = (layout.global_shape, layout.block, block)
        if name in state:
            mine[f"step.{name}"] = ((1,), (slice(0, 1),), state[name]["step"].float().view(1))
    result: dict[str, torch.Tensor] = {}
    for part in at_rank_0(mine):
        for key, (shape, block, values) in part.items():
            target = result.setdefault(key, torch.full(shape, float("nan")))
            known = target[block]
            assert known.isnan().all() or torch.equal(known, values), f"copies of {key} differ"
            target[block] = values
    for key, tensor in result.items():
        assert not tensor.isnan().any(), f"a part of {key} is on no rank"
    return result


def train_and_save(run: RunConfig, folder: Path, steps: int = 2) -> dict[str, torch.Tensor]:
    engine = create(run)
    train(engine, range(steps))
    sharded.save(engine, {"consumed_samples": 2 * steps}, folder, steps)
    return whole(engine)


def load_whole(run: RunConfig, folder: Path, finetune: bool = False):
    """(what load returned, whole tensors) of a fresh engine with another seed."""
    run.training.seed += 1
    engine = create(run)
    return sharded.load(engine, folder, finetune=finetune), whole(engine)

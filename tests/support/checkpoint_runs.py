"""Engines that train on random microbatches, and whole tensors gathered from their ranks."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_mm.checkpoint import sharded
from megatron_mm.checkpoint.optimizer_state import KINDS, collect
from megatron_mm.config import ParallelConfig, RunConfig, token_multiple
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import broadcast_batches
from megatron_mm.errors import CheckpointError
from megatron_mm.parallel import groups
from megatron_mm.parallel.param_layout import layouts
from megatron_mm.train.sft import SupervisedFineTuning
from support.batches import SIZES, microbatch, small_run
from support.fingerprints import parameter_hash, state_hash
from support.gathering import at_rank_0

PATTERN = "GE L *E J"
MICROBATCHES = ((1, 0, 2), (0, 0))  # images of each sample in a step; the second has none


def tiny_run(parallel: dict | None = None, pattern: str = PATTERN, **training) -> RunConfig:
    """Returns a run of the small model with a high learning rate.

    Args:
        parallel: sizes by their short names (`SIZES`), or settings of ParallelConfig by theirs.
        training: settings of the training section.
    """
    run = small_run(pattern)
    run.parallel = ParallelConfig(**{SIZES.get(k, k): v for k, v in (parallel or {}).items()})
    run.optimizer.lr, run.optimizer.lr_warmup_iters = 1e-2, 2
    for key, value in training.items():
        setattr(run.training, key, value)
    return run


def create(run: RunConfig, made: groups.Groups | None = None, drawn: bool = True) -> Engine:
    """Returns an engine of the run, in new process groups unless some are given."""
    return Engine.create(run, made or groups.build(run.parallel), drawn=drawn)


def train(engine: Engine, steps, images_of=MICROBATCHES) -> list[float]:
    """Takes one optimizer step for each number in `steps`, which seeds its microbatches.

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
        if engine.encoder is not None:
            mine = broadcast_batches(engine.groups, mine)
        parts = engine.forward_backward(mine, SupervisedFineTuning())
        total = torch.zeros(2, dtype=torch.float64)
        for metrics in parts:
            total += metrics.pair("train/lm_loss")
        dist.all_reduce(total, group=engine.groups.world)
        losses.append(float(total[0] / total[1]))
        engine.update(engine.gradient_norm())
        # Advance the generators, as augmentation or sampling would.
        torch.rand(3), np.random.rand(), random.random()
    return losses


def scramble() -> None:
    """Puts every random generator in the same state."""
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)


def whole(engine: Engine) -> dict[str, torch.Tensor]:
    """Returns every weight, moment and main parameter as a whole tensor on rank 0, {} elsewhere.

    Asserts that copies are bitwise identical and that nothing is missing.
    """
    state = collect(engine)
    mine = {}
    for name, param, layout in layouts(*engine.modules):
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
    """Trains a new engine, saves it and returns its whole tensors."""
    engine = create(run)
    train(engine, range(steps))
    sharded.save(engine, {"consumed_samples": 2 * steps}, folder, steps)
    return whole(engine)


def load_whole(run: RunConfig, folder: Path, finetune: bool = False):
    """Loads into a new engine without weights; returns the loaded state and whole tensors."""
    run.training.seed += 1
    engine = create(run, drawn=False)
    return sharded.load(engine, folder, finetune=finetune), whole(engine)


def weights(tensors: dict) -> dict[str, torch.Tensor]:
    """Returns the weights of what `whole` returned, by their names."""
    return {k.removeprefix("weight."): t for k, t in tensors.items() if k.startswith("weight.")}


def untrained(run) -> dict:
    """Returns the whole tensors of a new engine."""
    return whole(create(run))


def assert_same(ours: dict, theirs: dict) -> None:
    """Asserts the same names and bitwise identical tensors."""
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key


def interrupted(run: RunConfig, folder: Path) -> dict[str, str]:
    """Returns this rank's hashes at the save, at the end, and both again from the checkpoint."""
    seen = {}
    engine = create(run)
    scramble()
    train(engine, range(3))
    sharded.save(engine, {"consumed_samples": 6}, folder, 3)
    seen["saved"] = state_hash(engine)
    train(engine, range(3, 5))
    seen["end"] = state_hash(engine)
    run.training.seed += 1  # what is not loaded will differ
    again = create(run, engine.groups)
    seen["fresh"] = parameter_hash(again)
    state = sharded.load(again, folder)
    assert (state["iteration"], state["loader"]) == (3, {"consumed_samples": 6})
    seen["loaded"] = state_hash(again)
    train(again, range(3, 5))
    seen["end again"] = state_hash(again)
    seen["end weights"] = parameter_hash(again)
    return seen


def attempt(run, folder: Path, finetune: bool) -> tuple[str, bool]:
    """Returns the error of a load, and whether it left the engine as it was."""
    engine = create(run)
    before = state_hash(engine)
    with pytest.raises(CheckpointError) as caught:
        sharded.load(engine, folder, finetune=finetune)
    return str(caught.value), state_hash(engine) == before


def refused(ranks, folder, run=None, size=2, finetune=False) -> str:
    """Asserts that every rank rejects `folder` with the same line, and returns it."""
    results = ranks(size, attempt, run or tiny_run(dict(pp=2)), folder, finetune)
    messages = {message for message, _ in results}
    assert len(messages) == 1, "the ranks say different things"
    assert all(untouched for _, untouched in results)
    (message,) = messages
    assert "\n" not in message
    return message

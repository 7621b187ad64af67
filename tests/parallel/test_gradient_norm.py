"""The norm of all gradients: megatron-core's own to the bit on any layout, with one wait."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mm.config import ParallelConfig, RunConfig
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.optimizer import gradient_norm
from megatron_mm.parallel import groups
from megatron_mm.train.sft import SupervisedFineTuning
from support.invariance import invariance_run
from support.layouts import parallel_config, steps_batches

aten = torch.ops.aten
# Two parts, dense and experts; with virtual stages more. Ranks are counted once: TP copies norms,
# EP leaves replicas of the dense part, the distributed optimizer cuts what replicas share.
LAYOUTS = {
    "one rank": (1, {}, {}),
    "TP2": (2, {"tp": 2}, {}),
    "TP2, shared key/value heads, distributed": (4, {"tp": 4}, {}),
    "EP2": (2, {"ep": 2}, {}),
    "TP2xEP2 with expert-TP2": (4, {"tp": 2, "ep": 2, "etp": 2}, {}),
    "DP2": (2, {}, {}),
    "DP2, bf16": (2, {}, {"bf16": True}),
    "DP2, whole optimizer": (2, {"use_distributed_optimizer": False}, {}),
    "PP2xVPP2": (2, {"pp": 2, "vpp": 2}, {}),
    "TP2xPP2xEP2": (4, {"tp": 2, "pp": 2, "ep": 2, "etp": 1}, {}),
    "PP2, nothing to train on the last": (
        2,
        {"pp": 2},
        dict(freeze_language=True, freeze_experts=True),
    ),
}


class Reads(TorchDispatchMode):
    """Counts numbers that Python asks of tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._overloadpacket is aten._local_scalar_dense
        return func(*args, **kwargs or {})


def gradients_of_a_step(run: RunConfig, parallel: ParallelConfig) -> Engine:
    run.parallel = parallel
    made = groups.build(parallel)
    engine = Engine.create(run, made)
    dp = made.pg.dp
    batches = steps_batches(run, run.parallel.tensor_model_parallel_size)
    engine.forward_backward(batches[dp.rank() :: dp.size()], SupervisedFineTuning())
    engine.optimizer.prepare_grads()
    return engine


def on_rank_both_norms(run: RunConfig, parallel: ParallelConfig) -> dict:
    engine = gradients_of_a_step(run, parallel)
    with Reads() as ours:
        found = gradient_norm(engine.optimizer, engine.groups.pg.dp_cp)
    with Reads() as theirs:
        expected = float(engine.optimizer.get_grad_norm())
    poisoned = [norm_with(engine, value) for value in (math.inf, math.nan)]
    return {
        "found": found,
        "expected": expected,
        "reads": ours.count,
        "theirs": theirs.count,
        "finite": [math.isfinite(norm) for norm in poisoned],
    }


def norm_with(engine: Engine, value: float) -> float:
    """The norm when every parameter on the last model-parallel rank has an element like this."""
    mp = engine.groups.pg.mp
    for chunk in engine.chunks:
        for param in chunk.parameters():
            if param.requires_grad and mp.rank() == mp.size() - 1:
                param.main_grad.view(-1)[0] = value
    engine.optimizer.prepare_grads()
    return gradient_norm(engine.optimizer, engine.groups.pg.dp_cp)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_norm_is_megatron_cores(ranks, name):
    size, sizes, training = LAYOUTS[name]
    found = ranks(size, on_rank_both_norms, invariance_run(**training), parallel_config(**sizes))
    for rank in found:
        assert rank["found"] == rank["expected"] == found[0]["found"] > 0
        assert rank["reads"] == 0 < rank["theirs"]
        assert rank["finite"] == [False, False]

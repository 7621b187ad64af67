"""InternViT-6B's layers on tensor-parallel ranks: heads that do not divide, norms over all of
them together; compiled and not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch._dynamo import optimize, reset
from torch._dynamo.utils import counters

from megatron_mm.config import ParallelConfig, RunConfig
from megatron_mm.engine.engine import Engine
from support.invariance import compare, invariance_run
from support.layouts import parallel_config, step_gradients


def six_b_run(**settings) -> RunConfig:
    """The run of test_invariance with the layers of InternViT-6B; five heads."""
    run = invariance_run(**settings)
    run.model.vision = replace(
        run.model.vision,
        vision_normalization="RMSNorm",
        vision_add_qkv_bias=False,
        vision_qk_layernorm=True,
    )
    return run


def compiled(engine: Engine) -> None:
    """What `layer.compile()` does, which is without effect on a machine without CUDA, by a compiler
    that takes seconds."""
    for chunk in engine.chunks:
        for layer in chunk.vision.vit.layers if chunk.vision is not None else ():
            layer._compiled_call_impl = optimize("aot_eager")(layer._call_impl)


def counted(run: RunConfig, parallel: ParallelConfig) -> tuple[tuple, int]:
    """`step_gradients` with compiled layers, and the number of graphs that were compiled."""
    reset()
    counters.clear()
    found = step_gradients(run, parallel, compiled)
    return found, counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def reference(ranks):
    return {
        multiple: ranks(1, step_gradients, six_b_run(), parallel_config(), None, multiple)[0]
        for multiple in (1, 2, 4)
    }


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_do_not_depend_on_the_layout(ranks, reference, size):
    found = ranks(size, step_gradients, six_b_run(), parallel_config(tp=size))[0]
    compare(found, reference[size])


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("recompute", [None, "full"])
def test_compiled_layers_compute_the_same(ranks, reference, size, recompute):
    """Four microbatches of different numbers of tiles, one of them without any, through DDP's
    hooks."""
    run = six_b_run(recompute_granularity=recompute)
    found, graphs = ranks(size, counted, run, parallel_config(tp=size))[0]
    compare(found, reference[size])
    assert graphs > 3

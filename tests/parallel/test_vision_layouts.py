"""InternViT-6B's layers on tensor-parallel ranks: heads that do not divide, norms over all of
them together; compiled and not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch._dynamo import optimize, reset
from torch._dynamo.utils import counters

from megatron_mm.config import RunConfig
from megatron_mm.engine.engine import Engine
from megatron_mm.model.compiled import compile_layers
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
    """Compiles as `compile_vision` does, by a compiler that takes seconds: without CUDA
    `layer.compile()` has no effect."""
    layers = engine.chunks[0].vision.vit.layers
    compile_layers(layers)
    for layer in layers:
        layer._compiled_call_impl = optimize("aot_eager")(layer._call_impl)


def counted(run: RunConfig) -> tuple[tuple, dict[str, int]]:
    """`step_gradients` with compiled layers, and what the compiler counted."""
    reset()
    counters.clear()
    found = step_gradients(run, parallel_config(), compiled)
    breaks = sum(counters["graph_break"].values())
    return found, {"graphs": counters["stats"]["unique_graphs"], "breaks": breaks}


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


@pytest.mark.parametrize("recompute", [None, "full"])
def test_compiled_layers_compute_the_same(ranks, reference, recompute):
    """Four microbatches of different numbers of tiles, one of them without any, through DDP's
    hooks. A layer is one graph: for one tile, for any number, and with gradients or without."""
    run = six_b_run(recompute_granularity=recompute)
    found, stats = ranks(1, counted, run)[0]
    compare(found, reference[1])
    assert 0 < stats["graphs"] <= 4 and stats["breaks"] == 0, stats

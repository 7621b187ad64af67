"""The parallel model is the single-rank model: same loss, same gradient of every parameter.

Real gloo ranks, fp32, one seed, per-token loss, balancing loss on, two look/inject pairs that
cross boundaries, CLVR's out-projection away from zero, a trainable ViT, a text-only
microbatch, the same four microbatches on both sides.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from support.invariance import BROKEN, LAYOUTS, RECOMPUTE, compare, invariance_run, worst
from support.layouts import (
    detach_memory_on_the_wire,
    forget_reduction,
    parallel_config,
    saved_bytes,
    step_gradients,
)

PADDED = 64  # the multiple of the padded cases


@pytest.fixture(scope="module")
def reference(ranks):
    """By multiple of padding: a tensor- or context-parallel layout pads its stream, so does its
    twin. At 64 most of some streams is padding."""
    return {
        multiple: ranks(1, step_gradients, invariance_run(), parallel_config(), None, multiple)[0]
        for multiple in (1, 2, 4, PADDED)
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_do_not_depend_on_the_layout(ranks, reference, name):
    """Packed: several samples of different lengths in every microbatch but one."""
    size, sizes = LAYOUTS[name]
    found = ranks(size, step_gradients, invariance_run(), parallel_config(**sizes))[0]
    compare(found, reference[sizes.get("tp", 1) * sizes.get("cp", 1)])


@pytest.mark.parametrize(
    "name",
    ["TP4", "CP2", "TP2xCP2", "PP2xVPP2", "PP4xVPP2", "TP2xPP2xEP2", "PP2xCP2xEP2"],
)
@pytest.mark.parametrize("recompute", ["none", "full", "all modules"])
def test_padding_and_recompute_change_nothing(ranks, reference, name, recompute):
    size, sizes = LAYOUTS[name]
    run = invariance_run(**RECOMPUTE.get(recompute, {}))
    found = ranks(size, step_gradients, run, parallel_config(**sizes), None, PADDED)[0]
    compare(found, reference[PADDED])


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recompute_changes_no_bit_on_one_rank(ranks, reference, recompute):
    run = invariance_run(**RECOMPUTE[recompute])
    loss, gradients = ranks(1, step_gradients, run, parallel_config(), None, 1)[0]
    expected_loss, expected = reference[1]
    assert loss == expected_loss
    for name, value in expected.items():
        assert torch.equal(gradients[name], value), name


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recompute_keeps_less(ranks, recompute):
    """Bytes that autograd holds between forward and backward."""
    kept = ranks(1, saved_bytes, invariance_run(**RECOMPUTE[recompute]))[0]
    assert kept < 0.8 * ranks(1, saved_bytes, invariance_run())[0]


def test_an_uneven_split_is_computed_alike(ranks, reference):
    """The stage with the ViT and a look has one mixer, the last one the rest."""
    parallel = parallel_config(pp=2, pipeline_model_parallel_layout="GE L | *E GE L J *E J")
    compare(ranks(2, step_gradients, invariance_run(), parallel)[0], reference[1])


def test_a_memory_detached_on_the_wire_is_noticed(ranks, reference):
    _, broken = ranks(
        2, step_gradients, invariance_run(), parallel_config(pp=2), detach_memory_on_the_wire
    )[0]
    error, parameter = worst(broken, reference[1][1])
    assert error > BROKEN
    assert parameter.startswith("vision.")


@pytest.mark.parametrize(
    "suffix",
    [
        "mixer.inner.out_norm.weight",
        "mixer.inner.q_norm.weight",
        "mixer.norm.weight",
        "moe.inner.router.weight",
        "shared_experts.gate_weight",
        "looks.0.memory_norm.weight",
        "looks.1.query_norm.weight",
        "final_norm.weight",
    ],
)
def test_a_lost_tensor_parallel_reduction_is_noticed(ranks, reference, suffix):
    _, broken = ranks(
        2,
        step_gradients,
        invariance_run(),
        parallel_config(tp=2),
        partial(forget_reduction, suffix=suffix),
    )[0]
    error, parameter = worst(broken, reference[2][1])
    assert error > BROKEN
    assert parameter.endswith(suffix)

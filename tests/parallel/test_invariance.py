"""The parallel model is the single-rank model: same loss, same gradient of every parameter.

Real gloo ranks, fp32, one seed, per-token loss, balancing loss on, two look/inject pairs that
cross boundaries, CLVR's out-projection away from zero, a trainable ViT, a text-only
microbatch, the same four microbatches on both sides.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megatron_mm.config import RunConfig
from support.batches import small_run
from support.layouts import (
    detach_memory_on_the_wire,
    forget_reduction,
    parallel_config,
    saved_bytes,
    step_gradients,
)

# fp32 sums in another order. The worst seen is 3.1e-6 (dt_bias and A_log, whose gradients are
# differences of large terms); pipeline layouts are equal to the bit. A lost reduction or a
# detached tensor gives more than 1e-2, as the tests at the end assert.
TOLERANCE = 1e-5
BROKEN = 1e-2

# Two key/value groups: on four tensor-parallel ranks two ranks share one. Five heads in the ViT.
PADDED = 64
LAYOUTS = {
    "TP2": (2, dict(tp=2, etp=1)),
    "TP2 with expert-TP2": (2, dict(tp=2, etp=2)),
    "TP4": (4, dict(tp=4)),
    "CP2": (2, dict(cp=2)),
    "CP4": (4, dict(cp=4)),
    "PP2": (2, dict(pp=2)),
    "PP4": (4, dict(pp=4)),
    "PP2xVPP2": (2, dict(pp=2, vpp=2)),
    "PP4xVPP2": (4, dict(pp=4, vpp=2)),
    "EP2": (2, dict(ep=2)),
    "DP2": (2, dict()),
    "TP2xCP2": (4, dict(tp=2, cp=2)),
    "TP2xPP2": (4, dict(tp=2, pp=2)),
    "TP2xEP2": (2, dict(tp=2, ep=2, etp=1)),
    "TP2xEP2 with expert-TP2": (4, dict(tp=2, ep=2, etp=2)),
    "PP2xEP2": (4, dict(pp=2, ep=2)),
    "PP2xDP2": (4, dict(pp=2)),
    "TP2xPP2xEP2": (4, dict(tp=2, pp=2, ep=2, etp=1)),
    "PP2xCP2xEP2": (4, dict(pp=2, cp=2, ep=2)),
    "TP2xPP2xVPP2xEP2": (4, dict(tp=2, pp=2, vpp=2, ep=2, etp=1)),
    "PP2xVPP2xCP2": (4, dict(pp=2, vpp=2, cp=2)),
}


# Recomputing runs the same operations again, so it changes no bit on one rank; on several the
# order of accumulation of gradients may change.
RECOMPUTE = {
    "full": dict(recompute_granularity="full", recompute_num_layers=2),
    "full, odd blocks": dict(recompute_granularity="full", recompute_num_layers=3),
    "core_attn": dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
    "all modules": dict(
        recompute_granularity="selective", recompute_modules=["core_attn", "moe", "vision"]
    ),
}


def invariance_run(**training) -> RunConfig:
    """With the standard deviation that models really start from: at five times that, layers
    amplify rounding so much that fp32 itself is off by 4e-5."""
    run = small_run()
    run.model.language.init_method_std = run.model.vision.vision_init_method_std = 0.02
    for name, value in training.items():
        setattr(run.training, name, value)
    return run


@pytest.fixture(scope="module")
def reference(ranks):
    """By multiple of padding: a tensor- or context-parallel layout pads its stream, so does its
    twin. At 64 most of some streams is padding."""
    return {
        multiple: ranks(1, step_gradients, invariance_run(), parallel_config(), None, multiple)[0]
        for multiple in (1, 2, 4, PADDED)
    }


def worst(ours: dict, theirs: dict) -> tuple[float, str]:
    assert ours.keys() == theirs.keys()
    errors = {
        name: float((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-20))
        for name in theirs
        if name != "replicas"
    }
    name = max(errors, key=errors.get)
    return errors[name], name


def compare(found: tuple, expected: tuple, tolerance: float = TOLERANCE) -> None:
    (loss, gradients), (expected_loss, expected_gradients) = found, expected
    error, parameter = worst(gradients, expected_gradients)
    assert abs(loss - expected_loss) <= tolerance * abs(expected_loss)
    assert error <= tolerance, f"{parameter}: {error:.2e}"
    assert gradients["replicas"] <= tolerance


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

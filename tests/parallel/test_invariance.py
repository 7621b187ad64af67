"""The parallel model is the single-rank model: same loss, same gradient of every parameter.

Real gloo ranks, fp32, one seed, per-token loss, balancing loss on, two look/inject pairs that
cross boundaries, CLVR's out-projection away from zero, a trainable ViT, a text-only
microbatch, the same four microbatches on both sides.
"""

from __future__ import annotations

from functools import partial

import pytest
from batches import small_run
from layouts import detach_memory_on_the_wire, forget_reduction, parallel_config, step_gradients

from megatron_mm.config import RunConfig

# fp32 sums in another order. The worst seen is 3e-6 (A_log, whose gradient is a difference of
# large terms); pipeline layouts are equal to the bit. A lost reduction or a detached tensor
# gives more than 1e-2, as the tests at the end assert.
TOLERANCE = 1e-5
BROKEN = 1e-2

LAYOUTS = {
    "TP2": (2, dict(tp=2, etp=1)),
    "TP2 with expert-TP2": (2, dict(tp=2, etp=2)),
    "PP2": (2, dict(pp=2)),
    "PP4": (4, dict(pp=4)),
    "EP2": (2, dict(ep=2)),
    "DP2": (2, dict()),
    "TP2xPP2": (4, dict(tp=2, pp=2)),
    "TP2xEP2": (2, dict(tp=2, ep=2, etp=1)),
    "TP2xEP2 with expert-TP2": (4, dict(tp=2, ep=2, etp=2)),
    "PP2xEP2": (4, dict(pp=2, ep=2)),
    "PP2xDP2": (4, dict(pp=2)),
}


def invariance_run() -> RunConfig:
    """With the standard deviation that models really start from: at five times that, layers
    amplify rounding so much that fp32 itself is off by 4e-5."""
    run = small_run()
    run.model.language.init_method_std = run.model.vision.vision_init_method_std = 0.02
    return run


@pytest.fixture(scope="module")
def reference(ranks):
    """By multiple of padding: a tensor-parallel layout pads its stream, so does its twin."""
    return {
        multiple: ranks(1, step_gradients, invariance_run(), parallel_config(), None, multiple)[0]
        for multiple in (1, 2)
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


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_do_not_depend_on_the_layout(ranks, reference, name):
    size, sizes = LAYOUTS[name]
    loss, gradients = ranks(size, step_gradients, invariance_run(), parallel_config(**sizes))[0]
    expected_loss, expected = reference[sizes.get("tp", 1)]
    error, parameter = worst(gradients, expected)
    assert abs(loss - expected_loss) <= TOLERANCE * abs(expected_loss)
    assert error <= TOLERANCE, f"{parameter}: {error:.2e}"
    assert gradients["replicas"] <= TOLERANCE


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

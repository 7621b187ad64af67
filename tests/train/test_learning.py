"""Which parameters learn, how fast, and which decay.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

import pytest

from megatron_mm.config import MODULES
from megatron_mm.engine.optimizer import module_of
from megatron_mm.parallel.param_layout import layouts
from support.trainers import (
    LAYOUTS,
    PP2,
    digits_run,
    new_trainer,
    on_rank_change,
    parameters,
)

# Those of the demo's model; glimpses have tests/train/test_look_training.py.
THERE = [module for module in MODULES if module != "avm"]


def test_a_frozen_module_stays_and_the_others_learn(ranks, scenes):
    runs = [digits_run(scenes, **{f"freeze_{module}": True}) for module in THERE]
    for module, changed in zip(THERE, ranks(1, on_rank_change, *runs)[0], strict=True):
        frozen = {name for name in changed if module_of(name) == module}
        assert frozen
        assert {name for name in changed if not changed[name]} == frozen


def test_a_stage_without_anything_to_learn(ranks, scenes):
    """Aligning the projector alone leaves the second stage nothing to update; gradients pass
    through it all the same."""
    freeze = {f"freeze_{module}": True for module in MODULES if module != "projector"}
    (first,), (second,) = ranks(2, on_rank_change, digits_run(scenes, **PP2, **freeze))
    assert {name for name, changed in first.items() if changed} == {
        name for name in first if module_of(name) == "projector"
    }
    assert second and not any(second.values())


def test_modules_are_told_apart_by_name():
    expected = {
        "vision.vit.layers.0.norm1.weight": "vision",
        "vision.vit.embedding.class_token": "vision",
        "vision.projector.linear_fc1.weight": "projector",
        "vision.memory_proj.weight": "clvr",
        "language.looks.0.linear_q.weight": "clvr",
        "language.layers.3.moe.inner.router.weight": "router",
        "language.layers.3.moe.inner.experts.down": "experts",
        "language.layers.3.moe.inner.shared_experts.linear_fc1.weight": "language",
        "embedding.weight": "language",
        "output_layer.weight": "language",
    }
    assert {name: module_of(name) for name in expected} == expected


# ---- rates and decay ----

RATES = {
    "vision": 0.5,
    "projector": 2.0,
    "language": 1.0,
    "experts": 1.5,
    "clvr": 3.0,
    "router": 0.25,
}


def on_rank_decay(run) -> tuple[dict[str, float], set]:
    """name -> by what factor a step with zero gradients shrinks each parameter."""
    trainer = new_trainer(run)
    engine = trainer.engine
    for _, param, _ in layouts(*engine.chunks):
        param.data.uniform_(0.5, 1.5)  # no zeros, on which decay would not be seen
    engine.optimizer.reload_model_params()
    before = parameters(trainer)
    engine.models[0].zero_grad_buffer()
    engine.optimizer.zero_grad()
    engine.update(engine.gradient_norm())
    factors = {}
    for name, param in parameters(trainer).items():
        ratio = param.double() / before[name].double()
        # fp32: one rounding of the product, 6e-8.
        assert float(ratio.max() - ratio.min()) < 1e-6, name
        factors[name] = float(ratio.mean())
    return factors, {(g["max_lr"], g["wd_mult"]) for g in engine.optimizer.param_groups}


def spared(name: str) -> bool:
    """Norms, biases, A_log, dt_bias, layer scales, class token and positions."""
    parts = name.split(".")
    return (
        any("norm" in part for part in parts)
        or parts[-1] in ("bias", "patch_bias", "A_log", "dt_bias", "scale1", "scale2")
        or parts[-1] in ("class_token", "positions")
    )


@pytest.mark.parametrize("name", ["one rank", "DP2"])
def test_rates_and_weight_decay_by_name(ranks, scenes, name):
    """With zero gradients AdamW does p -> p (1 - rate x decay): one step shows both the rate
    and the decay of every parameter."""
    rates = {f"lr_mult_{m}": rate for m, rate in RATES.items() if m != "language"}
    size, sizes = LAYOUTS[name]
    run = digits_run(
        scenes, lr=1e-3, weight_decay=100.0, lr_decay_style="constant", **rates, **sizes
    )
    for factors, in_groups in ranks(size, on_rank_decay, run):
        assert {module_of(name) for name in factors} == set(THERE)
        kept = {name for name in factors if spared(name)}
        assert kept and len(kept) < len(factors)
        for name, factor in factors.items():
            expected = 1.0 if name in kept else 1.0 - 1e-3 * RATES[module_of(name)] * 100.0
            assert factor == pytest.approx(expected, abs=1e-6), name
        assert {rate for rate, _ in in_groups} <= {1e-3 * rate for rate in RATES.values()}
        assert {wd for _, wd in in_groups} == {0.0, 1.0}

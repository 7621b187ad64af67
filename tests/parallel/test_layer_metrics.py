"""Numbers that a layer adds in one line: the same under every layout, and once under recompute."""

from __future__ import annotations

import pytest

from megatron_mm.model.layers.moe import MixtureOfExperts
from megatron_mm.parallel import groups
from megatron_mm.train.trainer import Trainer
from support.trainers import LAYOUTS, digits_run
from support.weights import move_looks_off_zero


def on_rank_step(run) -> dict[str, float]:
    forward = MixtureOfExperts.forward

    def counting(self, hidden_t1H, context):
        size_t = hidden_t1H.abs().mean(dim=(1, 2))
        if context.padding_1t is not None:
            size_t = size_t[~context.padding_1t[0]]
        context.metrics.sum("moe/positions", len(size_t))
        context.metrics.ratio("moe/input", size_t.sum(), len(size_t))
        context.metrics.max("moe/largest", size_t.max() if len(size_t) else 0.0)
        return forward(self, hidden_t1H, context)

    MixtureOfExperts.forward = counting
    try:
        trainer = Trainer(run, groups.build(run.parallel))
        move_looks_off_zero(trainer.engine)
        return trainer.step()
    finally:
        MixtureOfExperts.forward = forward


FULL = dict(recompute_granularity="full")
CASES = {name: (size, sizes) for name, (size, sizes) in LAYOUTS.items()}
CASES |= {
    "one rank, recomputing": (1, FULL),
    "TP2xPP2, recomputing": (4, LAYOUTS["TP2xPP2"][1] | FULL),
    "PP2, recomputing experts": (
        2,
        LAYOUTS["PP2"][1] | dict(recompute_granularity="selective", recompute_modules=["moe"]),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_layers_add_does_not_depend_on_the_layout(ranks, scenes, name):
    size, sizes = CASES[name]
    (expected,) = ranks(1, on_rank_step, digits_run(scenes))
    for found in ranks(size, on_rank_step, digits_run(scenes, **sizes)):
        # Every position of both layers once.
        assert found["moe/positions"] == 2 * found["train/tokens"] == expected["moe/positions"]
        for key in ("moe/input", "moe/largest", "train/lm_loss"):
            # fp32 sums in another order.
            assert found[key] == pytest.approx(expected[key], rel=1e-5), key

"""Without gradients a lone rank takes a shorter way through products and experts: the same bits."""

from __future__ import annotations

import torch

from megatron_mm.config import RunConfig
from megatron_mm.engine.engine import Engine
from megatron_mm.model.layers.moe import MixtureOfExperts
from megatron_mm.parallel import groups
from support.batches import microbatch, small_model


def on_rank_both_ways(run: RunConfig, images: tuple[int, ...]) -> dict:
    engine = Engine.create(run, groups.build(run.parallel))
    engine.training(False)
    model = engine.chunks[0]
    layers = [m for m in model.modules() if isinstance(m, MixtureOfExperts)]
    dispatched = []
    for layer in layers:
        send = layer.token_dispatcher.token_dispatch
        layer.token_dispatcher.token_dispatch = lambda *a, send=send: (
            dispatched.append(1) or send(*a)
        )
    batch = microbatch(run.model, 1, images)
    long = model(batch).logits().detach()
    counted = len(dispatched)
    with torch.no_grad():
        short = model(batch).logits()
    return {
        "layers": len(layers),
        "dispatched": (counted, len(dispatched) - counted),
        "same": torch.equal(long, short),
        "moving": bool(long.std() > 0),
    }


def test_the_short_way_computes_the_same_bits(ranks):
    model = small_model("GE *E GE", vision_memory="none")
    found = ranks(1, on_rank_both_ways, RunConfig(model=model), (1, 0, 2))[0]
    assert found == {"layers": 3, "dispatched": (3, 0), "same": True, "moving": True}


def test_ranks_that_share_experts_dispatch(ranks):
    run = RunConfig(model=small_model("GE *E GE", vision_memory="none"))
    run.parallel.expert_model_parallel_size = 2
    for found in ranks(2, on_rank_both_ways, run, (1, 0, 2)):
        assert found == {"layers": 3, "dispatched": (3, 3), "same": True, "moving": True}

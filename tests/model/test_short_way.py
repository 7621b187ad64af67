"""A lone rank takes a shorter way through products and experts: the same bits."""

from __future__ import annotations

import pytest
import torch

from megatron_mm.config import RunConfig
from megatron_mm.engine.engine import Engine
from megatron_mm.parallel import groups
from megatron_mm.train.sft import SupervisedFineTuning
from support.batches import microbatch, small_model
from support.experts import dispatch, moe_layers


def on_rank_both_ways(run: RunConfig, images: tuple[int, ...]) -> dict:
    """Logits and gradients of an engine as it is, and of one that always dispatches."""
    made = groups.build(run.parallel)
    ways, dispatched = [], []
    for prepare in (lambda engine: None, dispatch):
        engine = Engine.create(run, made)
        prepare(engine)
        for layer in moe_layers(engine):
            send = layer.token_dispatcher.token_dispatch
            layer.token_dispatcher.token_dispatch = lambda *a, send=send: (
                dispatched.append(1) or send(*a)
            )
        # The second microbatch is padded.
        batches = [microbatch(run.model, 1, images), microbatch(run.model, 2, images, 64)]
        engine.forward_backward(batches, SupervisedFineTuning())
        found = {name: p.main_grad for name, p in engine.chunks[0].named_parameters()}
        engine.training(False)
        with torch.no_grad():
            found["logits"] = engine.chunks[0](batches[1]).logits()
        found["logits with gradients"] = engine.chunks[0](batches[1]).logits().detach()
        ways.append((found, len(dispatched)))
        dispatched.clear()
    (short, few), (long, many) = ways
    return {
        "dispatched": (few, many),
        "differ": [name for name in long if not torch.equal(short[name], long[name])],
        "zero": [name for name in long if not long[name].any()],
    }


@pytest.mark.parametrize("bf16", [False, True])
def test_the_short_way_computes_the_same_bits(ranks, bf16):
    run = RunConfig(model=small_model("GE *E GE", vision_memory="none"))
    run.training.bf16 = bf16
    found = ranks(1, on_rank_both_ways, run, (1, 0, 2))[0]
    assert found == {"dispatched": (0, 12), "differ": [], "zero": []}


def test_ranks_that_share_experts_dispatch(ranks):
    run = RunConfig(model=small_model("GE *E GE", vision_memory="none"))
    run.parallel.expert_model_parallel_size = 2
    for found in ranks(2, on_rank_both_ways, run, (1, 0, 2)):
        assert found == {"dispatched": (12, 12), "differ": [], "zero": []}

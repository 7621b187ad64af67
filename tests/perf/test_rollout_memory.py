"""The planned memory of a rollout against the caches of one that ran, on gloo ranks."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from megatron_mm.config import RunConfig
from megatron_mm.engine.engine import Engine
from megatron_mm.generation import generate as module
from megatron_mm.generation.generate import Prompts, generate
from megatron_mm.generation.sampling import Sampling
from megatron_mm.parallel import groups
from megatron_mm.perf.assumed import planned_batch
from megatron_mm.perf.rank import plan_rank
from megatron_mm.perf.rollout import RolloutTrace
from megatron_mm.rl.settings import RLConfig
from support.planned_layouts import layout_run, world_of

NEW, GROUP, ROWS = 32, 2, 8


def rl_run(sizes: dict) -> RunConfig:
    run = layout_run(sizes, 1)
    run.training.objective, run.data.max_num_tiles = "grpo", 1
    rl = run.section(RLConfig)
    rl.num_generations, rl.max_num_seqs, rl.max_completion_length = GROUP, ROWS, NEW
    rl.routing_replay, rl.reward_funcs = "R3", ["math"]
    run.data.seq_length = 128
    run.training.global_batch_size = 8
    return run


def cached(run: RunConfig) -> tuple[int, int]:
    """Generates with every row in use to its last token. Returns the sequences that the replica
    generated at a time, and the bytes of their caches on this rank."""
    engine = Engine.create(run, groups.build(run.parallel))
    short = deepcopy(run)
    short.data.seq_length -= NEW
    prompt = planned_batch(short)
    prompt = replace(
        prompt,
        pixels_NCHW=torch.zeros(prompt.pixels_NCHW.shape, dtype=torch.uint8),
        samples=["one"],
    )
    lanes = []

    class Lane(module.Lane):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            lanes.append(self)

    def read(number: int):
        return SimpleNamespace(tokens_T=prompt.tokens_T)

    with (
        patch.object(module, "Lane", Lane),
        patch.object(module, "collate", lambda *a, **k: prompt),
    ):
        generate(
            engine,
            Prompts(read, range(ROWS // GROUP)),
            Sampling((-1,), NEW),
            num_generations=GROUP,
            max_num_seqs=ROWS,
            pad_id=0,
            record_routes=True,
        )
    tensors = [
        tensor
        for lane in lanes
        for state in lane.cache.layers.values()
        for tensor in state.tensors.values()
    ]
    # Shared memory, if any, would count twice.
    assert len({tensor.untyped_storage()._cdata for tensor in tensors}) == len(tensors)
    return sum(lane.cache.rows for lane in lanes), sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("sizes", [{}, {"tp": 2, "ep": 2, "etp": 1}, {"pp": 2}], ids=str)
def test_planned_caches_are_those_of_a_rollout(ranks, sizes):
    run = rl_run(sizes)
    world = world_of(run, 1)
    batch = planned_batch(run)
    plans = [plan_rank(run, rank, world, batch, kernels="torch") for rank in range(world)]
    for plan, (rows, held) in zip(plans, ranks(world, cached, run), strict=True):
        assert plan.rollout.rows == rows
        # Small tensors beside them: what a look keeps to mask its scores, the room for tokens that
        # are drawn before the host looks.
        assert plan.rollout.cache == pytest.approx(held, rel=0.02)
        assert plan.rollout.prefill > 0 and plan.beside_state >= plan.rollout.peak
    # Tokens are drawn on the last stage, of every tensor-parallel rank.
    last = world - 1 if "pp" in sizes else 0
    assert [plan.rollout.drawing > 0 for plan in plans] == [n >= last for n in range(world)]


def test_caches_by_hand():
    """bf16, one rank; keys and values, states, inputs of the convolutions, looks, routes."""
    run = rl_run({"bf16": True})
    run.model.language.num_experts = 4
    (plan,) = [plan_rank(run, 0, 1, planned_batch(run))]
    lm, pattern = run.model.language, run.model.hybrid_layer_pattern
    fusion, positions = run.model.fusion, 192  # 128, and a turn's tokens, in steps of 64
    keys, values = lm.linear_num_key_heads, lm.linear_num_value_heads
    channels = 2 * keys * lm.linear_key_head_dim + values * lm.linear_value_head_dim
    state = 4 * values * lm.linear_key_head_dim * lm.linear_value_head_dim
    delta = state + 2 * (lm.linear_conv_kernel_dim - 1) * channels
    attention = 2 * 2 * positions * lm.num_query_groups * lm.kv_channels
    patches = 64  # 16 of the tile, and room in steps of 64
    look = 2 * 2 * patches * fusion.clvr_num_attention_heads * fusion.clvr_kv_channels
    routes = 2 * pattern.count("E") * positions * lm.moe_router_topk
    row = pattern.count("G") * delta + pattern.count("*") * attention
    row += pattern.count("L") * look + routes
    # Beside them: the number of patches that a look's row has.
    assert plan.rollout.cache == pytest.approx(ROWS * row, rel=0.01)


def test_the_most_rows_that_fit():
    rollout = RolloutTrace(16, 4, 8, cache=1600, prefill=500, drawing=320, host=0)
    assert rollout.peak == 2100
    assert rollout.most_rows(2100) == 16 and rollout.most_rows(2099) == 12
    assert rollout.most_rows(1300) == 8 and rollout.most_rows(1299) == 0  # less than a group's room
    nothing = RolloutTrace(16, 4, 8, cache=0, prefill=500, drawing=0, host=0)  # the ViT's stage
    assert nothing.most_rows(500) == float("inf") and nothing.most_rows(499) == 0
    wide = RolloutTrace(16, 4, 8, cache=1600, prefill=0, drawing=3200, host=0)
    assert wide.most_rows(4800) == 16 and wide.most_rows(4799) == 12

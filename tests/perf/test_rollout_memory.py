"""The planned memory of a rollout against the caches of one that ran, on gloo ranks."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from megatron_mm.config import ConfigError, RunConfig, model_stages
from megatron_mm.data.sample import Size
from megatron_mm.engine.engine import Engine
from megatron_mm.generation import generate as module
from megatron_mm.generation.generate import Prompts, generate
from megatron_mm.generation.sampling import Sampling
from megatron_mm.parallel import groups
from megatron_mm.perf import search
from megatron_mm.perf.assumed import planned_batch
from megatron_mm.perf.hardware import Assumptions, gpu
from megatron_mm.perf.layout import most_sequences, plan_layout
from megatron_mm.perf.pieces import rough_rank, trace_pieces
from megatron_mm.perf.rank import plan_rank
from megatron_mm.perf.rollout import RolloutTrace, held_weights
from megatron_mm.rl.reference_settings import ReferenceConfig
from megatron_mm.rl.settings import RLConfig, resolved
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
        return SimpleNamespace(size=Size(len(prompt.tokens_T), 0))

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


@pytest.mark.parametrize("sizes", [{"bf16": True}, {"pp": 2, "bf16": True}], ids=str)
def test_a_rough_rollout_is_that_of_a_full_plan(sizes):
    """The pieces have other lanes and rows. A stage's cache is the sum of theirs."""
    run = rl_run(sizes)
    run.section(RLConfig).max_num_seqs = 64
    world, stages = world_of(run, 1), list(model_stages(run))
    pieces = trace_pieces(run, 1, 1.0)
    for place in range(world):
        full = plan_rank(run, place, world, planned_batch(run)).rollout
        rough = rough_rank(run, world, stages, place, pieces).rollout
        assert (rough.rows, rough.lanes, rough.multiple, rough.least) == (
            full.rows, full.lanes, full.multiple, full.least
        )  # fmt: skip
        # What a look keeps to mask its scores is small and has other rows.
        assert rough.cache == pytest.approx(full.cache, rel=0.01)
        assert rough.drawing == pytest.approx(full.drawing, rel=0.01)
        assert 0 < rough.prefill <= 1.01 * full.prefill


def test_a_rollout_finds_what_training_leaves_behind():
    run = rl_run({"tp": 2, "bf16": True})
    plan = plan_rank(run, 0, 2, planned_batch(run))
    # megatron-core's buffer gathers a stage's input: tokens, hidden size, two bytes.
    assert plan.stays >= 2 * run.data.seq_length * run.model.language.hidden_size
    assert plan.in_rollout == plan.rollout.peak + plan.stays
    assert plan.beside_state == max(plan.activations, plan.in_rollout)
    plan = replace(plan, rollout=replace(plan.rollout, prefill=0, drawing=0))
    able = plan.state.total + plan.in_rollout
    assert most_sequences([plan], able) == plan.rollout.rows
    assert most_sequences([plan], able - 1) < plan.rollout.rows


def test_a_search_names_the_sequences_that_do_not_fit(monkeypatch):
    """Training fits, and the caches of a hundred thousand sequences do not: no layout is traced in
    full, and the number that the error names fits."""
    run, silent = rl_run({"bf16": True}), SimpleNamespace(total=None)
    silent.update = silent.set_description = lambda *_: None
    rl = run.section(RLConfig)
    rl.max_num_seqs = 100_000
    few = replace(gpu("H100"), memory=1e9)
    monkeypatch.setattr(search, "candidates", lambda made, *_: [deepcopy(made)])
    with pytest.raises(ConfigError) as caught:
        search.search(run, 1, few, Assumptions(), 1, 1.0, 1, silent)
    found = re.search(
        r"leanest needs about (\S+) GB a GPU, a H100 has (\S+); allowed: --max-num-seqs of about "
        r"(\d+) or fewer",
        str(caught.value),
    )
    assert found and float(found[1]) > float(found[2]) and 0 < int(found[3]) < 100_000
    rl.max_num_seqs = int(found[3])
    (plan,) = search.search(run, 1, few, Assumptions(), 1, 1.0, 1, silent).plans
    assert plan.fits


def test_a_search_ends_in_time_where_nothing_fits(monkeypatch):
    """A rough plan that is too lean, for a layout that cannot fit: one is traced, and no more."""
    run, silent, traced = rl_run({"bf16": True}), SimpleNamespace(total=None), []
    silent.update = silent.set_description = lambda *_: None
    small = replace(gpu("H100"), memory=1e6)

    def full(*args):
        traced.append(plan_layout(*args))
        return traced[-1]

    monkeypatch.setattr(search, "candidates", lambda made, *_: [deepcopy(made) for _ in range(3)])
    monkeypatch.setattr(search, "ROUGH", 1e9)
    monkeypatch.setattr(search, "SECONDS", 0)
    monkeypatch.setattr(search, "plan_layout", full)
    with pytest.raises(ConfigError, match="no layout was found to fit in 0 s, not all of 3 were"):
        search.search(run, 1, small, Assumptions(), 1, 1.0, 1, silent)
    assert len(traced) == 1


def reads_routes(completions, routed_experts, **columns):
    return [0.0] * len(completions)


def test_a_reward_that_reads_routes_has_them_recorded():
    """As the collector does: int16 of each layer's experts, for every position of every row."""
    run = rl_run({"bf16": True})
    run.section(RLConfig).routing_replay = "none"
    batch = planned_batch(run)
    plain = plan_rank(run, 0, 1, batch).rollout
    run.section(RLConfig).reward_funcs = [f"{__name__}.reads_routes"]
    recorded = plan_rank(run, 0, 1, batch).rollout
    lm, positions = run.model.language, 192
    routes = 2 * run.model.hybrid_layer_pattern.count("E") * positions * lm.moe_router_topk
    assert recorded.cache - plain.cache == plain.rows * routes


def test_host_memory_has_the_reference_and_every_teacher():
    """Beside the model's own weights while another set is in place. A checkpoint with two names is
    held once; an average is kept in fp32."""
    run = rl_run({"bf16": True})
    rl, reference = run.section(RLConfig), run.section(ReferenceConfig)
    weights = 1000
    assert held_weights(run, resolved(run), weights) == 0
    rl.teacher_load = ["a=one", "b=two", "c=one"]
    assert held_weights(run, resolved(run), weights) == 3 * weights
    rl.ref_load = "ref"
    assert held_weights(run, resolved(run), weights) == 4 * weights
    reference.sync_ref_model = True
    assert held_weights(run, resolved(run), weights) == 5 * weights
    reference.ref_model_mixup_alpha = 1.0
    plan = plan_rank(run, 0, 1, planned_batch(run))
    assert plan.rollout.host == 4 * plan.state.parameters


def test_the_most_rows_that_fit():
    rollout = RolloutTrace(16, 2, 4, 8, cache=1600, prefill=500, drawing=320, host=0)
    assert rollout.peak == 2100
    assert rollout.most_rows(2100) == 16 and rollout.most_rows(2099) == 12
    assert rollout.most_rows(1300) == 8 and rollout.most_rows(1299) == 0  # less than a group's room
    nothing = RolloutTrace(16, 2, 4, 8, cache=0, prefill=500, drawing=0, host=0)  # the ViT's stage
    assert nothing.most_rows(500) == float("inf") and nothing.most_rows(499) == 0
    wide = RolloutTrace(16, 2, 4, 8, cache=1600, prefill=0, drawing=3200, host=0)
    assert wide.most_rows(4800) == 16 and wide.most_rows(4799) == 12

"""The closed count of FLOPs is what torch's counter sees in a real step, whatever learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch.utils.flop_counter import FlopCounterMode

from megatron_mm.config import MODULES, RunConfig
from megatron_mm.config.settings import ParallelConfig
from megatron_mm.config.tree import leaves, value_at
from megatron_mm.data.batch import Microbatch
from megatron_mm.engine.engine import Engine
from megatron_mm.model.layers import cross_entropy
from megatron_mm.model.routing import FREE, NOT_HANDED
from megatron_mm.parallel import groups
from megatron_mm.perf.flops import executed_flops, model_flops, total
from megatron_mm.perf.work import executed, needed
from megatron_mm.train.sft import SupervisedFineTuning
from support.batches import microbatch, small_run, two_memories

aten = torch.ops.aten


@pytest.fixture(scope="module")
def built():
    """Process groups of a job of one rank; gone after the module."""
    torch.set_num_threads(1)
    groups.start(ParallelConfig())
    yield groups.build(ParallelConfig())
    groups.stop()
    destroy_moe_metrics_tracker()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None


def attention(query, key, value, *_, out_shape=None, **__):
    """Scores and mixtures of all pairs of the rectangle."""
    rows, heads, queries, width = query
    return 4 * rows * heads * queries * key[2] * width


def attention_backward(gradient, *inputs, out_shape=None, **_):
    """Five products where the forward pass has two: the scores are computed again."""
    return attention(*inputs) * 5 // 2


# torch's counter has no formula for its CPU kernels.
KERNELS = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


LOOKS = "GE L *E GE L J *E J"


def run_with(pattern=LOOKS, fusion: dict | None = None, **settings) -> RunConfig:
    run = small_run(pattern, **(fusion or {}))
    paths = {leaf.name: leaf.path for leaf in leaves(RunConfig)}
    for name, value in settings.items():
        setattr(value_at(run, paths[name][:-1]), name, value)
    return run


def step(run: RunConfig, batches: list[Microbatch], built) -> int:
    """FLOPs of a real step's forward and backward passes, by torch's counter."""
    engine = Engine.create(run, built)
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        engine.forward_backward(batches, SupervisedFineTuning())
    return counter.get_total_flops()


def logits(batch: Microbatch) -> int:
    return len(SupervisedFineTuning().positions(batch))


FROZEN = {f"freeze_{module}": True for module in MODULES if module != "clvr"}
GLIMPSES = "GE Q *E L Q GE V J *E V"
CASES = {
    "all learns": {},
    "a frozen ViT": {"freeze_vision": True},
    "CLVR alone learns": FROZEN,
    "CLVR is frozen": {"freeze_clvr": True, "freeze_router": True},
    "the router alone": FROZEN | {"freeze_clvr": True, "freeze_router": False},
    "experts alone": FROZEN | {"freeze_clvr": True, "freeze_experts": False},
    "experts are frozen": {"freeze_experts": True},
    "the language model is frozen": {"freeze_language": True},
    "LoRA": {"lora_rank": 3, "lora_targets": ["language", "vision"], "freeze_router": True},
    "LoRA on the projector": FROZEN | {"lora_rank": 3, "lora_targets": ["projector"]},
    "no memory": {"vision_memory": "none"},
    "two memories": {"fusion": two_memories("detail", "overview")},
    "two memories, recomputed": {
        "fusion": two_memories("overview", "detail"),
        "recompute_granularity": "full",
    },
    "glimpses": {"pattern": GLIMPSES, "vision_memory": "pyramid"},
    "glimpses alone learn": FROZEN
    | {"freeze_clvr": True, "freeze_avm": False, "pattern": GLIMPSES, "vision_memory": "pyramid"},
    "glimpses, recomputed": {
        "pattern": GLIMPSES,
        "vision_memory": "pyramid",
        "recompute_granularity": "full",
    },
    "recomputed in full": {"recompute_granularity": "full"},
    "LoRA, recomputed": {"lora_rank": 3, "recompute_granularity": "full"},
    "recomputed cores": {"recompute_granularity": "selective"},
    "recomputed experts and ViT": {
        "recompute_granularity": "selective",
        "recompute_modules": ["moe", "vision"],
    },
}


@pytest.mark.parametrize("case", CASES)
def test_the_executed_count_is_that_of_torch(built, case):
    run = run_with(**CASES[case])
    # Several lengths, of one chunk of the delta rule and of two; padding; a text without images.
    batches = [
        microbatch(run.model, 1, (2, 0, 1), pad_multiple=16),
        microbatch(run.model, 2, (4,)),
        microbatch(run.model, 3, (0, 0)),
    ]
    assert batches[1].cu_seqlens[-1] > 32
    counted = sum(total(executed_flops(run, batch, logits(batch))) for batch in batches)
    assert counted == step(run, batches, built)


HANDED = {
    "all": 1.0,
    "a part": 0.25,
    "nobody": 0.0,
}


@pytest.mark.parametrize("handed", HANDED)
@pytest.mark.parametrize(
    "case", ["all learns", "the router alone", "experts alone", "LoRA, recomputed", "no memory"]
)
def test_a_second_hop_is_counted_by_its_rows(built, case, handed):
    """Experts by the tokens that are handed over, the gate by all."""
    run = run_with("GC L *E GC L J *C J", **CASES[case])
    batch = microbatch(run.model, 1, (2, 0, 1))
    tokens = len(batch.tokens_T)
    rows = round(HANDED[handed] * tokens)
    run.model.layers["C"].delegate_planned_share = rows / tokens
    routes = torch.full((tokens, 4), FREE, dtype=torch.int16)
    routes[rows:, 2:] = NOT_HANDED
    without = routes.clone()
    without[:, 2:] = NOT_HANDED
    batch = replace(batch, routes=dict.fromkeys((0, 2, 3), routes) | {1: without})
    counted = total(executed_flops(run, batch, logits(batch)))
    # The share is a fraction: the count is whole to within rounding.
    assert counted == pytest.approx(step(run, [batch], built), abs=0.5)


def test_logits_in_blocks_are_computed_again(built, monkeypatch):
    run = run_with()
    batch = microbatch(run.model, 1, (2, 0, 1))
    whole = executed_flops(run, batch, logits(batch))["output"]
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 0)
    monkeypatch.setattr(cross_entropy, "WIDTH_MULTIPLE", 16)
    cut = executed_flops(run, batch, logits(batch))
    assert whole.again == 0 and cut["output"].again == whole.forward > 0
    assert total(cut) == step(run, [batch], built)
    assert model_flops(run, batch, logits(batch))["output"].again == 0


def test_the_models_count_is_the_executed_one_without_its_overhead(built):
    """One sample that fills its rectangle: what differs is named and computed here by hand."""
    run = run_with()
    batch = microbatch(run.model, 5, (1,))
    asked, done = needed(run, batch, 9), executed(run, batch, 9)
    tokens, lm, fusion = len(batch.tokens_T), run.model.language, run.model.fusion
    parts, spent = model_flops(run, batch, 9), executed_flops(run, batch, 9)
    same = ("projector", "router", "experts", "output")
    assert {n: parts[n] for n in same} == {n: spent[n] for n in same}
    # Attention: pairs in the future, and scores that the backward pass computes again.
    layers, heads = 2, lm.num_attention_heads * lm.kv_channels
    future = tokens * (tokens - 1) / 2
    assert spent["attention"].forward - parts["attention"].forward == layers * 4 * heads * future
    again = layers * 2 * heads * tokens**2
    wasted = layers * 8 * heads * future + again
    assert spent["attention"].backward - parts["attention"].backward == wasted
    # A look multiplies what it sees, and padding rows of the memory.
    width = fusion.clvr_num_attention_heads * fusion.clvr_kv_channels
    visible = batch.memories["vision"].visible_M2
    seen = int((visible[:, 1] - visible[:, 0]).sum())
    mine, ours = asked.memories["vision"], done.memories["vision"]
    assert mine.pairs == ours.pairs == seen < tokens * len(visible)
    padding = ours.rows - mine.rows
    rows = 2 * padding * width * (2 * fusion.memory_hidden_size + 24)
    assert spent["looks"].forward - parts["looks"].forward == 2 * rows
    # The delta rule: three products with the state, forward, against chunks.
    state = lm.linear_num_value_heads * lm.linear_key_head_dim * lm.linear_value_head_dim
    assert asked.mixing == {"G": (6 * tokens * state, 12 * tokens * state)}
    assert done.mixing["G"][0] > asked.mixing["G"][0]


def test_padding_and_dummy_tiles_are_not_the_models(built):
    run = run_with()
    text = microbatch(run.model, 3, (0, 0))
    padded = microbatch(run.model, 3, (0, 0), pad_multiple=64)
    assert len(padded.tokens_T) > len(text.tokens_T)
    assert model_flops(run, padded, 4) == model_flops(run, text, 4)
    parts = model_flops(run, text, 4)
    assert parts["vision"].total == parts["projector"].total == 0 and "memory" not in parts
    assert total(executed_flops(run, padded, 4)) > total(executed_flops(run, text, 4))


def test_of_the_experts_only_those_that_are_chosen(built):
    batch = microbatch(run_with().model, 1)
    two, four = (
        model_flops(run_with(moe_router_topk=k), batch, 4)["experts"].forward for k in (2, 4)
    )
    lm, rows = run_with().model.language, batch.num_real_tokens
    assert four - two == 4 * 2 * rows * 2 * 3 * lm.hidden_size * lm.moe_ffn_hidden_size

"""FLOPs of the model are those of a step in which nothing is computed twice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_mm.config import LoraConfig, RunConfig
from megatron_mm.model.layers import cross_entropy
from megatron_mm.perf.assumed import planned_batch
from megatron_mm.perf.flops import count, total
from megatron_mm.perf.predict import step_flops
from megatron_mm.perf.rank import RankPlan, plan_rank
from megatron_mm.perf.work import executed
from support.planned_layouts import layout_run

RECOMPUTE = {
    "none": (None, ["core_attn"]),
    "attention": ("selective", ["core_attn", "vision"]),
    "experts": ("selective", ["moe", "vision"]),
    "full": ("full", ["core_attn"]),
}
PARTS = ("nothing", "all but LoRA", "language", "vision", "vision, projector")


def made(frozen: str, recompute: str = "none", **sizes) -> RunConfig:
    run = layout_run({"bf16": True, **sizes}, 1)
    run.training.recompute_granularity, modules = RECOMPUTE[recompute]
    run.training.recompute_modules = list(modules)
    if frozen == "all but LoRA":
        run.lora = LoraConfig(lora_rank=4)
    elif frozen != "nothing":
        for module in frozen.split(", "):
            setattr(run.training, f"freeze_{module}", True)
    return run


def plan(run: RunConfig, kernels: str = "cuda") -> RankPlan:
    return plan_rank(run, 0, 1, planned_batch(run), kernels)


@pytest.mark.parametrize("frozen", PARTS[:4])
def test_recompute_adds_no_flops_to_the_model(frozen):
    """Nor does an encoder beside the pipeline, which encodes twice."""
    plans = [plan(made(frozen, how)) for how in RECOMPUTE]
    beside = plan(made(frozen, "full", vision_parallel="replica"))
    assert len({step_flops(one) for one in [*plans, beside]}) == 1
    none, attention, experts, full = (one.step.flops for one in plans)
    assert full > max(attention, experts) and min(attention, experts) > none
    assert step_flops(plans[0]) < none  # the scores of attention, at least, are computed again


@pytest.mark.parametrize("frozen", PARTS)
def test_they_are_those_that_are_counted_product_by_product(frozen, monkeypatch):
    """Of layers whose backward pass repeats only what is marked; with the logits in blocks."""
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 1)
    monkeypatch.setattr(cross_entropy, "WIDTH_MULTIPLE", 32)
    sizes = {"hybrid_layer_pattern": "*E L *E J"}
    found = plan(made(frozen, "full", **sizes), "torch")
    run = made(frozen, **sizes)
    batch = planned_batch(run)
    positions = int((batch.loss_mask_T > 0).sum())
    work = replace(executed(run, batch, positions), attention_backward=2.0)
    monkeypatch.undo()  # in one block nothing is counted twice
    assert step_flops(found) == found.microbatches * total(count(run, work))

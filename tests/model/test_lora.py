"""An adapter computes nothing at the start, eq. 3 of the paper after, and the same when merged."""

from __future__ import annotations

import pytest
import torch

from megatron_mm.config import MODULES, LoraConfig
from megatron_mm.engine.optimizer import freeze
from megatron_mm.model.layers.lora import adapted, is_adapter, merge
from megatron_mm.model.multimodal import build
from support.batches import microbatch, small_run

TARGETS = ["language", "vision", "projector"]
ADAPTERS = {"language": 8, "vision": 8, "projector": 2}  # linears of `GE*E` and two ViT layers


def run_with(*targets: str, bf16: bool = False):
    run = small_run("GE L *E J")
    run.training.bf16 = bf16
    if targets:
        run.lora = LoraConfig(lora_rank=3, lora_alpha=12.0, lora_targets=[*targets])
    return run


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(microbatch(model.model_config, 5)).logits()


def move_b(model) -> None:
    generator = torch.Generator().manual_seed(1)
    for linear in adapted(model):
        linear.lora.b.data.normal_(0.0, 0.1, generator=generator)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_the_start_is_the_base_to_the_bit(pg, target, bf16):
    base, ours = build(run_with(bf16=bf16), pg)[0], build(run_with(target, bf16=bf16), pg)[0]
    own = dict(ours.named_parameters())
    assert sum(is_adapter(name) for name in own) == 2 * ADAPTERS[target]
    for name, param in base.named_parameters():
        assert torch.equal(own[name], param), name
    expected = logits(base)
    assert torch.equal(logits(ours), expected)
    move_b(ours)
    assert (logits(ours) - expected).norm() > 0.01 * expected.norm()


def test_off_is_the_default(pg):
    assert not [*adapted(build(run_with(), pg)[0])]


def test_an_adapter_adds_alpha_over_r_times_b_a_x(pg):
    model = build(run_with(*TARGETS), pg)[0]
    linear = model.language.layers["1"]["mixer"].inner.linear_qkv
    x = torch.randn(5, 1, 64)
    base, _ = linear(x)
    move_b(model)
    a, b = linear.lora.a, linear.lora.b
    assert a.shape == (3, 64) and b.shape == (linear.weight.shape[0], 3)
    assert a.abs().max() <= 64**-0.5 and a.std() > 0.5 * 64**-0.5
    expected = base + (12.0 / 3) * (x @ a.T @ b.T)
    # One more fp32 product and sum, in another order.
    assert torch.allclose(linear(x)[0], expected, rtol=1e-5, atol=1e-6)


def test_a_bias_is_added_once(pg):
    model = build(run_with(*TARGETS), pg)[0]
    linear = model.vision.vit.layers[0].linear_fc2
    torch.nn.init.ones_(linear.bias)
    assert torch.equal(linear(torch.zeros(2, 3, 72))[0], torch.ones(2, 3, 40))


@pytest.mark.parametrize("target", ["language", "vision"])
def test_adapters_in_a_recomputed_first_layer_learn(pg, target):
    """Nothing below them learns, neither the embedding nor the ViT."""
    run = run_with(target)
    for module in MODULES:
        setattr(run.training, f"freeze_{module}", True)
    found = []
    for granularity in (None, "full"):
        run.training.recompute_granularity = granularity
        model = build(run, pg)[0]
        freeze(model, run)
        move_b(model)
        model(microbatch(run.model, 5)).logits().square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) == 2 * ADAPTERS[target]
    assert all(map(is_adapter, found[0])) and found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][name], grad) for name, grad in found[0].items())


# Merging rounds W + dW once, the adapters round B (A x) at every linear: fp32's 6e-8 grown
# over 18 linears. 1.2e-6 was seen.
TOLERANCE = 5e-6


def test_merged_is_the_same_function_without_adapters(pg):
    base, model = build(run_with(), pg)[0], build(run_with(*TARGETS), pg)[0]
    move_b(model)
    expected = logits(model)
    assert merge(model) == sum(ADAPTERS.values())
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in base.named_parameters()}
    found = logits(model)
    assert (found - expected).norm() <= TOLERANCE * expected.norm()
    assert merge(model) == 0
    assert torch.equal(logits(model), found)


def test_merging_rounds_once_in_bf16(pg):
    model = build(run_with("language", bf16=True), pg)[0]
    move_b(model)
    linear = model.language.layers["0"]["moe"].inner.shared_experts.linear_fc1
    weight, lora = linear.weight.detach().clone(), linear.lora
    exact = weight.double() + (12.0 / 3) * lora.b.double() @ lora.a.double()
    merge(model)
    assert linear.weight.dtype == torch.bfloat16
    # Half a unit in the last of bf16's 8 bits, after fp32's own rounding of 2^-24.
    assert ((linear.weight - exact).abs() <= exact.abs() * 2**-8 + 1e-7).all()
    twice = (exact - weight).bfloat16() + weight
    assert ((twice - exact).abs() > exact.abs() * 2**-8 + 1e-7).any()

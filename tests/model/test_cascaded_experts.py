"""The second hop of a layer of experts, beside a token by token reference, in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megatron_mm.config import (
    Layer,
    RunConfig,
)
from megatron_mm.model.backends.choice import choose
from megatron_mm.model.context import StreamContext
from megatron_mm.model.core_config import language_config
from megatron_mm.model.decode import DecodeCache
from megatron_mm.model.layers.cascade import CascadedExperts
from megatron_mm.model.layers.interface import BuildContext
from megatron_mm.model.recompute import Recompute
from megatron_mm.model.routing import FREE, NOT_HANDED, Routing
from megatron_mm.report.metrics import Metrics
from support.batches import microbatch
from support.cascades import cascade_run

WIDTH = 4  # two experts in each hop


def layer_of(run: RunConfig, pg, hard: bool) -> CascadedExperts:
    """A layer of random weights in fp64, in evaluation; its scale is away from zero."""
    layer = Layer("C", number=0)
    config = language_config(run)
    made = (
        CascadedExperts.build(
            BuildContext(run, layer, config, pg, choose(run.backend), Recompute())
        )
        .double()
        .eval()
    )
    generator = torch.Generator().manual_seed(5)
    for _, param in sorted(made.named_parameters()):
        param.data.normal_(0.0, 0.3, generator=generator)
    made.delegate.hard.data.fill_(float(hard))
    made.router.config.moe_router_dtype = "fp64"
    return made


def case(pg, hard: bool = True, given: torch.Tensor | None = None, **settings):
    """(layer, context, stream [t, 1, H])"""
    settings = {"delegate_hard_from": 1.0} | settings
    run = cascade_run("GC *C", **settings)
    run.model.language.moe_router_dtype = "fp64"
    run.model.language.moe_aux_loss_coeff = 0.0
    run.model.language.moe_ffn_hidden_size = 27  # torch has no grouped product in fp64
    layer = layer_of(run, pg, hard)
    batch = microbatch(run.model, 1, (1,), pad_multiple=8)
    context = StreamContext.build(batch, run.model, pg, [])
    context.first_pass_metrics = Metrics()
    tokens = len(batch.tokens_T)
    assert tokens != batch.num_real_tokens  # padding is among them
    record: dict = {}
    routes = {} if given is None else {0: given.expand(tokens, -1)}
    context.routing = Routing(WIDTH, given=routes, record=record)
    generator = torch.Generator().manual_seed(2)
    stream = torch.randn(tokens, 1, run.model.language.hidden_size, generator=generator)
    return layer, context, stream.requires_grad_()


def normed(stream: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(stream, stream.shape[-1:], eps=1e-6)


def run_layer(layer: CascadedExperts, context: StreamContext, stream) -> torch.Tensor:
    return layer.run(normed(stream), context, None, stream)


def expert(layer: CascadedExperts, number: int, x_H: torch.Tensor) -> torch.Tensor:
    gate, up = layer.experts.gate_up[number]
    return layer.experts.down[number] @ (F.silu(gate @ x_H) * (up @ x_H))


def by_hand(
    layer: CascadedExperts, stream: torch.Tensor, hard: bool, real: int
) -> tuple[torch.Tensor, list[list[int]]]:
    """The layer token by token, and the routes of both hops."""
    delegate, settings, out, routes = layer.delegate, layer.delegate.settings, [], []
    shared = layer.shared_experts
    fc1, fc2 = shared.linear_fc1.weight, shared.linear_fc2.weight
    for place, (h, x) in enumerate(zip(stream[:, 0], normed(stream)[:, 0], strict=True)):
        logits = layer.router.weight @ x
        first = logits.topk(2).indices
        y = torch.zeros_like(h)
        for weight, number in zip(logits[first].softmax(0), first.tolist(), strict=True):
            y = y + weight * expert(layer, number, x)
        gate, up = (fc1 @ x).chunk(2)
        y = y + (shared.gate_weight[0] @ x).sigmoid() * (fc2 @ (F.silu(gate) * up))
        read = h if settings.delegate_input == "stream" else h + y
        z = F.rms_norm(read, read.shape, 1 + delegate.norm.weight, eps=1e-6)
        opened = (delegate.gate.weight[0] @ z + delegate.gate.bias[0]).sigmoid()
        scores = allowed = delegate.router.weight @ z
        if settings.delegate_distinct:
            allowed = scores.index_fill(0, first, -torch.inf)
        second = allowed.topk(delegate.k).indices
        q = scores[second].softmax(0) if delegate.k > 1 else scores.softmax(0)[second]
        handed = place < real and (not hard or float(opened) > 0.5)
        if handed:
            found = torch.zeros_like(h)
            for weight, number in zip(q, second.tolist(), strict=True):
                found = found + weight * expert(layer, number, z)
            y = y + opened * delegate.scale * found
        out.append(y)
        last = second.tolist() if handed else [NOT_HANDED] * delegate.k
        routes.append(sorted(first.tolist()) + sorted(last))
    return torch.stack(out).unsqueeze(1), routes


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("dispatched", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"delegate_distinct": True},
        {"delegate_input": "stream"},
        {"delegate_topk": 1},
        {"delegate_topk": 1, "delegate_distinct": True},
        {"delegate_topk": 4, "delegate_distinct": True},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())) or "plain",
)
def test_it_is_the_sum_of_its_experts(pg, double, settings, dispatched, hard):
    """Forward, backward and routes, in the layer's own way and through a dispatcher."""
    layer, context, stream = case(pg, hard, **settings)
    context.routing = replace(context.routing, width=2 + layer.delegate.k)
    layer.alone = not dispatched
    out = run_layer(layer, context, stream)
    real = int((~context.padding_1t).sum())
    expected, routes = by_hand(layer, stream, hard, real)
    # fp64: thousands of terms in another order.
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-11)
    found = context.routing.record[0].tolist()
    assert [sorted(row[:2]) + sorted(row[2:]) for row in found] == routes
    handed = sum(row[-1] != NOT_HANDED for row in routes)
    assert handed == real if not hard else 0 < handed < real
    learns = [stream, *(p for p in layer.parameters() if p.requires_grad)]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    ours = torch.autograd.grad((out * weights).sum(), learns, allow_unused=True)
    theirs = torch.autograd.grad((expected * weights).sum(), learns, allow_unused=True)
    for param, mine, other in zip(learns, ours, theirs, strict=True):
        assert mine is not None
        other = torch.zeros_like(param) if other is None else other
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("name", ["gate.weight", "gate.bias", "router.weight", "scale"])
def test_gradients_are_finite_differences(pg, double, name, hard):
    """Along a random direction; the step moves no gate over 1/2 and changes no choice."""
    layer, context, stream = case(pg, hard)
    param = dict(layer.delegate.named_parameters())[name]
    generator = torch.Generator().manual_seed(4)
    along = torch.randn(param.shape, generator=generator)
    weights = torch.randn(stream.shape, generator=generator)

    def value(step: float) -> torch.Tensor:
        param.data.add_(along, alpha=step)
        found = (run_layer(layer, context, stream) * weights).sum()
        param.data.sub_(along, alpha=step)
        return found

    (gradient,) = torch.autograd.grad(value(0.0), [param])
    step = 1e-5
    difference = float(value(step) - value(-step)) / (2 * step)
    expected = float((gradient * along).sum())
    assert abs(expected) > 1e-3
    # The third derivative times the step squared, and rounding over the step: 1e-10 each.
    assert difference == pytest.approx(expected, rel=1e-7)


def test_a_scale_of_zero_is_the_first_hop_to_the_bit(pg):
    layer, context, stream = case(pg)
    layer, stream = layer.float(), stream.detach().float()
    layer.delegate.scale.data.zero_()
    first = super(CascadedExperts, layer).forward(normed(stream), context)
    assert torch.equal(run_layer(layer, context, stream), first)


# ---- routes


@pytest.mark.parametrize("hard", [True, False])
def test_given_routes_decide(pg, double, hard):
    """Who is handed over and to whom, whatever the gate says; its value stays the weight."""
    layer, context, stream = case(pg, hard, torch.tensor([5, 0, 3, 1]))
    everyone = run_layer(layer, context, stream)
    assert context.routing.record[0].tolist() == [[5, 0, 3, 1]] * len(stream)
    layer, context, stream = case(pg, hard, torch.tensor([5, 0, NOT_HANDED, NOT_HANDED]))
    nobody = run_layer(layer, context, stream)
    assert (context.routing.record[0][:, 2:] == NOT_HANDED).all()
    assert ((everyone - nobody).flatten(1).norm(dim=1) > 0).all()
    layer, context, stream = case(pg, hard, torch.tensor([5, 0, FREE, FREE]))
    run_layer(layer, context, stream)
    record = context.routing.record[0]
    free, context, _ = case(pg, hard)
    run_layer(free, context, stream)
    assert record[:, :2].tolist() == [[5, 0]] * len(stream)
    assert (record[:, 2:] != NOT_HANDED).any()


def test_forbidden_experts_are_in_neither_hop(pg, double):
    layer, context, stream = case(pg, False)
    banned = torch.tensor([True, False, False, True, False, False])
    context.routing = replace(context.routing, forbidden={0: banned})
    run_layer(layer, context, stream)
    assert not torch.isin(context.routing.record[0], torch.tensor([0, 3])).any()


@pytest.mark.parametrize("settings", [{}, {"delegate_distinct": True}, {"delegate_topk": 1}])
def test_a_step_is_the_whole_position_by_position(pg, double, settings):
    """And writes down the same routes."""
    layer, context, stream = case(pg, True, **settings)
    width = 2 + layer.delegate.k
    context.padding_1t, context.routing = None, Routing(width, record={})
    with torch.no_grad():
        whole = run_layer(layer, context, stream)
        cache = DecodeCache(len(stream))
        step = StreamContext.of_step(pg, cache)
        step.routing = Routing(width, record={})
        found = layer.run(normed(stream), step, None, stream)
    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-11)
    ours, theirs = step.routing.record[0], context.routing.record[0]
    assert torch.equal(ours[:, :2].sort(1).values, theirs[:, :2].sort(1).values)
    assert torch.equal(ours[:, 2:].sort(1).values, theirs[:, 2:].sort(1).values)
    assert 0 < (ours[:, 2] == NOT_HANDED).sum() < len(ours)


# ---- what it adds to the loss


def priced(layer, context, stream) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradient of the gate's bias by the price alone, and the gates [t]."""
    layer.train()
    (run_layer(layer, context, stream) * 0.0).sum().backward()
    with torch.no_grad():
        result = super(CascadedExperts, layer).forward(normed(stream), context)
        _, gate_t = layer.delegate._read(stream, result, context)
    return layer.delegate.gate.bias.grad, gate_t


def test_the_price_is_a_sum_over_real_tokens(pg, double):
    layer, context, stream = case(pg, True, delegate_price=0.25)
    found, gate_t = priced(layer, context, stream)
    gate_t = gate_t[~context.padding_1t[0]]
    torch.testing.assert_close(found[0], 0.25 * (gate_t * (1 - gate_t)).sum())
    assert float(context.metrics.pair("moe/delegate_price")[0]) == pytest.approx(
        0.25 * float(gate_t.sum())
    )


def test_a_price_weighs_a_position_as_the_loss_weighs_its_sample(pg, double):
    """Where the loss counts completions a long answer is not charged for every token."""
    layer, context, stream = case(pg, True, delegate_price=0.25)
    context.position_weight_t = torch.linspace(0, 1, len(stream), dtype=torch.float64)
    found, gate_t = priced(layer, context, stream)
    counted_t = context.position_weight_t * ~context.padding_1t[0]
    torch.testing.assert_close(found[0], 0.25 * (counted_t * gate_t * (1 - gate_t)).sum())


def test_what_it_measures(pg, double):
    layer, context, stream = case(pg)
    layer.train()
    run_layer(layer, context, stream)
    handed = (context.routing.record[0][:, 2] != NOT_HANDED).sum()
    real = (~context.padding_1t).sum()
    share, weight = context.metrics.pair("moe/delegated_share").tolist()
    assert share / weight == pytest.approx(float(handed / real))
    chosen = context.routing.record[0][: int(real)].flatten()
    load = torch.bincount(chosen[chosen >= 0].long(), minlength=6).double()
    above, weight = context.metrics.pair("moe/load_violation").tolist()
    assert above / weight == pytest.approx(float(load.max() / load.mean()) - 1)


def test_the_balancing_loss_is_switchs_of_those_that_are_handed_over(pg, double):
    layer, context, stream = case(pg)
    layer.train()
    layer.delegate.aux_loss_coeff = 0.5
    (run_layer(layer, context, stream) * 0.0).sum().backward()
    found = layer.delegate.router.weight.grad.clone()
    layer.zero_grad()
    record = context.routing.record[0]
    handed = record[:, 2] != NOT_HANDED
    result = super(CascadedExperts, layer).forward(normed(stream), context)
    z_tH, _ = layer.delegate._read(stream, result, context)
    scores = layer.delegate.router(z_tH[handed]).softmax(1)
    counts = torch.bincount(record[handed][:, 2:].flatten().long(), minlength=6)
    n, real = int(handed.sum()), int((~context.padding_1t).sum())
    switch = 6 * (scores.mean(0) * counts / (n * 2)).sum()
    (0.5 * switch * n / real * context.loss_weight).backward()
    torch.testing.assert_close(found, layer.delegate.router.weight.grad)


# ---- controls and the gate's schedule


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_control_hands_over_by_chance(pg, double, share):
    layer, context, stream = case(pg, delegate_random_share=share)
    positions = torch.arange(4000)
    context.position_ids_t = positions
    handed = layer.delegate._by_chance(4000, context)
    layer.delegate.seed += 1
    other = layer.delegate._by_chance(4000, context)
    layer.delegate.seed -= 1
    assert share in (0.0, 1.0) or float((handed & other).double().mean()) < share
    assert float(handed.double().mean()) == pytest.approx(share, abs=0.01)
    runs = (handed[1:] != handed[:-1]).sum()
    assert runs > 1000 or share in (0.0, 1.0)


def test_the_gate_closes_with_the_runs_progress(pg):
    layer, *_ = case(pg, hard=False, delegate_hard_from=0.25)
    hard = []
    for done in (0.0, 0.24, 0.25, 0.9):
        layer.delegate.at_progress(done)
        hard.append(float(layer.delegate.hard))
    assert hard == [0.0, 0.0, 1.0, 1.0]
    for hard in (False, True):  # 1: it stays as it is
        layer, *_ = case(pg, hard=hard, delegate_hard_from=1.0)
        layer.delegate.at_progress(1.0)
        assert float(layer.delegate.hard) == hard
    layer, *_ = case(pg, hard=True, delegate_hard_from=0.25)
    layer.delegate.at_progress(0.0)
    assert float(layer.delegate.hard) == 1.0  # a run that begins with a hard gate keeps it


def test_chance_begins_where_the_gate_is_hard(pg):
    """Or the control would also lack the soft half of the training."""
    for hard in (False, True):
        layer, context, stream = case(pg, hard=hard, delegate_random_share=0.3)
        gate = torch.ones(len(stream), dtype=stream.dtype)
        handed = layer.delegate._handed(gate, context, None, None)
        chance = layer.delegate._by_chance(len(stream), context)
        assert not chance.all() and handed.equal(chance) if hard else handed.all()


@pytest.mark.parametrize(("warmup", "prices"), [(0.5, [0.0, 0.1, 0.2, 0.2]), (0.0, [0.2] * 4)])
def test_the_price_rises_with_the_runs_progress(pg, warmup, prices):
    layer, *_ = case(pg, delegate_price=0.2, delegate_price_warmup=warmup)
    found = []
    for done in (0.0, 0.25, 0.5, 1.0):
        layer.delegate.at_progress(done)
        found.append(layer.delegate.price)
    assert found == pytest.approx(prices)

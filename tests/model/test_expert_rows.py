"""Rows that teach an expert and rows that do not, beside what autograd gives for the same."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_mm.model.backends.choice import choose
from megatron_mm.model.core_config import language_config
from megatron_mm.model.expert_scope import ExpertScope, TaughtWeights, read, signed
from megatron_mm.model.layers.experts import _Experts
from megatron_mm.model.layers.moe import MixtureOfExperts
from megatron_mm.model.layers.row_groups import InOneKernel, OneByOne
from megatron_mm.report.metrics import MUTED
from support.batches import microbatch, small_run

SIZES = [3, 0, 5, 2, 4]  # rows of five experts
EXPERTS, ROWS, HIDDEN, FFN = len(SIZES), sum(SIZES), 16, 8
GROUPS = {
    "one by one": OneByOne(SIZES),
    "one kernel": InOneKernel(torch.tensor(SIZES), torch.device("cpu")),
}
# No row of expert 2 teaches; of the others some do.
TAUGHT = torch.tensor([1, 0, 1, 0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 0]).bool()


def leaves(dtype=torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "x": (ROWS, HIDDEN),
        "gate_up": (EXPERTS, 2, FFN, HIDDEN),
        "down": (EXPERTS, HIDDEN, FFN),
    }
    made = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    made["probs"] = torch.rand(ROWS, generator=g)
    made["probs"][0], made["probs"][1] = 0.0, 0.0  # a row that teaches and one that does not
    return {name: value.to(dtype).requires_grad_() for name, value in made.items()}


def backward(out: torch.Tensor, made: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(d_out.to(out.dtype))
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in made.items()}}


def by_autograd(taught: torch.Tensor) -> dict[str, torch.Tensor]:
    """Row by row: one that does not teach meets weights that are constants."""
    made, rows = leaves(torch.float64), []
    owners = torch.arange(EXPERTS).repeat_interleave(torch.tensor(SIZES))
    for row, expert in enumerate(owners.tolist()):
        gate_up, down = made["gate_up"][expert], made["down"][expert]
        if not taught[row]:
            gate_up, down = gate_up.detach(), down.detach()
        gate, up = (half @ made["x"][row] for half in gate_up)
        rows.append(down @ (F.silu(gate) * up * made["probs"][row]))
    return backward(torch.stack(rows), made)


def ours(groups, taught: torch.Tensor | None) -> dict[str, torch.Tensor]:
    made = leaves()
    probs, teaches = made["probs"], None
    if taught is not None:
        probs, teaches = read(signed(probs, taught))
        assert torch.equal(teaches, taught)
    return backward(
        _Experts.apply(made["x"], probs, made["gate_up"], made["down"], groups, teaches), made
    )


def others_product(x, weight_EOI, teaches, groups) -> torch.Tensor:
    """A product whose weights are constants to autograd, as Transformer Engine sees them."""
    parts = zip(x.split(SIZES), weight_EOI.detach(), strict=True)
    y = torch.cat([rows @ weight.t() for rows, weight in parts])
    return TaughtWeights.apply(y, x, weight_EOI, teaches, groups)


def through_constants(groups, taught: torch.Tensor) -> dict[str, torch.Tensor]:
    made = leaves()
    probs, teaches = read(signed(made["probs"], taught))
    inner = others_product(made["x"], made["gate_up"].flatten(1, 2), teaches, groups)
    gate, up = inner.chunk(2, dim=-1)
    hidden = F.silu(gate) * up * probs.unsqueeze(-1)
    return backward(others_product(hidden, made["down"], teaches, groups), made)


@pytest.mark.parametrize("way", [ours, through_constants])
@pytest.mark.parametrize("groups", GROUPS)
def test_gradients_are_those_of_autograd_with_constants(groups, way):
    found, expected = way(GROUPS[groups], TAUGHT), by_autograd(TAUGHT)
    for name, value in expected.items():
        # Sums in fp32, 1e-7 of terms up to some hundred, which cancel: 2e-5 was seen. A row that
        # counts wrongly is off by its own size, which is about 1.
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-4)
    for name in ("gate_up", "down"):
        learns = found[name].flatten(1).abs().sum(1) > 0
        assert learns.tolist() == [True, False, False, True, True]
    nobody = way(GROUPS[groups], torch.zeros(ROWS, dtype=torch.bool))
    assert not nobody["gate_up"].any() and not nobody["down"].any()


@pytest.mark.parametrize("groups", GROUPS)
def test_only_gradients_of_weights_change(groups):
    """To the bit, with some rows, with none and with all of them teaching."""
    plain = ours(GROUPS[groups], None)
    everybody = ours(GROUPS[groups], torch.ones(ROWS, dtype=torch.bool))
    assert all(torch.equal(everybody[name], value) for name, value in plain.items())
    for taught in (TAUGHT, torch.zeros(ROWS, dtype=torch.bool)):
        scoped = ours(GROUPS[groups], taught)
        for name in ("out", "x", "probs"):
            assert torch.equal(scoped[name], plain[name]), name
        assert not torch.equal(scoped["gate_up"], plain["gate_up"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_sign_carries_one_bit_and_changes_no_other(dtype):
    """Zero and the smallest numbers included."""
    probs = torch.tensor([0.0, 0.0, 1.0, 1.0, 2**-130, 2**-130, 0.3, 0.7], dtype=dtype)
    teaches = torch.tensor([True, False] * 4)
    probs.requires_grad_()
    travels = signed(probs, teaches)
    assert torch.equal(travels.signbit(), ~teaches)
    found, taught = read(travels)
    assert torch.equal(taught, teaches) and not found.signbit().any()
    assert torch.equal(found, probs)
    gradient = torch.tensor([1.5, 1.5, -0.3, -0.3, 2**-130, 2**-130, 0.1, 7.0], dtype=dtype)
    found.backward(gradient)
    assert torch.equal(probs.grad, gradient)


def alone() -> SimpleNamespace:
    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    return SimpleNamespace(cp=one, tp=one)


def test_who_teaches_whom_by_hand():
    """Two skills, two layers, four experts; the second skill has no expert in layer 0."""
    clusters = torch.zeros(2, 2, 4, dtype=torch.bool)
    clusters[0, 0, 1] = clusters[0, 1, 2] = clusters[1, 1, 0] = clusters[1, 1, 3] = True
    batch = replace(microbatch(small_run().model, 1), skill_T=None)
    tokens = len(batch.tokens_T)
    skill_T = torch.full((tokens,), -1)
    skill_T[:2] = torch.tensor([0, 1])
    scope = ExpertScope.of(replace(batch, skill_T=skill_T), clusters, alone())
    learnt = batch.loss_mask_T.tolist()
    begins = [n for n in range(tokens) if learnt[n] and not (n and learnt[n - 1])]
    assert begins and scope.begins_t.nonzero().flatten().tolist() == begins
    for layer, expected in enumerate([[[1], []], [[2], [0, 3]]]):
        teaches = scope.teaches(layer)
        assert teaches.shape == (tokens, 4)
        assert [row.nonzero().flatten().tolist() for row in teaches[:2]] == expected
        assert not teaches[2:].any()
    with pytest.raises(ValueError, match="has no skill_T"):
        ExpertScope.of(batch, clusters, alone())


def test_experts_of_another_kind_are_refused(pg):
    """They would take the sign for a part of the probability."""
    run = small_run()
    layer = MixtureOfExperts(language_config(run), pg, 0, 0.1, 0.1, choose(run.backend))
    layer.experts = torch.nn.Identity()
    context = SimpleNamespace(
        loss_weight=1.0, padding_1t=None, routing=None, scope=object(), metrics=MUTED
    )
    with pytest.raises(ValueError, match="layer 0 of experts is a Identity, which knows no expert"):
        layer(torch.zeros(4, 1, run.model.language.hidden_size), context)

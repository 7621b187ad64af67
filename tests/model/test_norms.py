"""Norms and scaled residuals that are written out for speed, against their formulas."""

from __future__ import annotations

import pytest
import torch

from megatron_mm.model.layers.norms import (
    FullWidthRMSNorm,
    GatedRMSNorm,
    VisionRMSNorm,
    _SplitRMSNorm,
)
from megatron_mm.model.layers.scaled_add import scaled_add

EPS = 1e-6
# Half a unit in the last place of bf16 (8 bits), relative: one rounding.
ONCE = 2.0**-8


def randoms(*shapes, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=g, dtype=dtype).requires_grad_() for shape in shapes]


def rms(x, size=None):
    square = x.square().sum(-1, keepdim=True) / (size or x.shape[-1])
    return x / (square + EPS).sqrt()


def test_scaled_add():
    inputs = randoms((3, 4, 5), (3, 4, 5), (5,))
    torch.testing.assert_close(scaled_add(*inputs), inputs[0] + inputs[2] * inputs[1])
    assert torch.autograd.gradcheck(scaled_add, inputs)


def test_split_norm_and_its_gradient(pg):
    """A group of one rank, with fewer features than `size` says, as where others hold the rest."""
    x, weight = randoms((2, 3, 4, 5), (4, 5))
    found = _SplitRMSNorm.apply(x, weight, 30, EPS, pg.tp)
    expected = (rms(x.flatten(-2), 30) * weight.flatten()).view(x.shape)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(
        lambda x, weight: _SplitRMSNorm.apply(x, weight, 30, EPS, pg.tp), (x, weight)
    )


@torch.no_grad()
def test_a_norm_over_all_heads_is_the_same_split_or_not(pg):
    x, _ = randoms((2, 3, 4, 6), (24,), dtype=torch.float32)
    norm = FullWidthRMSNorm(24, 24, EPS, tp=pg.tp, dtype=torch.float32)
    norm.weight.normal_(1, 0.3, generator=torch.Generator().manual_seed(2))
    split = _SplitRMSNorm.apply(x, norm.weight.view(4, 6), 24, EPS, pg.tp)
    # fp32: a sum of 24 squares, a root and two products.
    torch.testing.assert_close(split, norm(x), rtol=1e-6, atol=0)


@torch.no_grad()
def test_in_bf16_a_norm_of_the_vit_rounds_once(pg):
    """Never further from the truth than half a unit, and fp32's own rounding. transformers rounds
    before the weight and after it."""
    norm = VisionRMSNorm(512, EPS, dtype=torch.bfloat16)
    g = torch.Generator().manual_seed(3)
    norm.weight.normal_(1, 0.3, generator=g)
    x = (3 * torch.randn(40, 512, generator=g)).bfloat16()
    exact = rms(x.double()) * norm.weight.double()
    found = norm(x)
    assert found.dtype == torch.bfloat16
    once = ONCE * (1 + 1e-4) * exact.abs()
    assert ((found.double() - exact).abs() <= once).all()
    twice = norm.weight * rms(x.float()).bfloat16()
    assert not ((twice.double() - exact).abs() <= once).all()
    # Split over ranks: normalised and scaled, two roundings.
    split = _SplitRMSNorm.apply(x.view(40, 8, 64), norm.weight.view(8, 64), 512, EPS, pg.tp)
    error = (split.flatten(1).double() - exact).abs()
    assert (error <= 2 * ONCE * (1 + ONCE) * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_split_norm_in_bf16(pg, dtype):
    """Against autograd through fp64: errors of a few roundings of the gradient's own size."""
    x, d_out = (t.detach().to(dtype) for t in randoms((50, 8, 64), (50, 8, 64)))
    weight = (1 + 0.3 * randoms((8, 64))[0].detach()).to(dtype)
    found = [t.clone().requires_grad_() for t in (x, weight)]
    _SplitRMSNorm.apply(*found, 512, EPS, pg.tp).backward(d_out)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    (rms(exact[0].flatten(1)).view(x.shape) * exact[1]).backward(d_out.double())
    for mine, truth in zip(found, exact, strict=True):
        error = (mine.grad.double() - truth.grad).norm() / truth.grad.norm()
        assert error <= (2 * ONCE if dtype == torch.bfloat16 else 1e-6)


@torch.no_grad()
def test_the_gated_norm_is_what_it_was_to_the_bit():
    """transformers' order of roundings: normalised in fp32, rounded, scaled, gated in fp32."""
    norm = GatedRMSNorm(64, EPS, dtype=torch.bfloat16)
    g = torch.Generator().manual_seed(4)
    norm.weight.normal_(1, 0.3, generator=g)
    x, gate = (torch.randn(30, 4, 64, generator=g).bfloat16() for _ in "xg")
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    expected = (norm.weight * normed.bfloat16() * torch.nn.functional.silu(gate.float())).bfloat16()
    assert torch.equal(norm(x, gate), expected)

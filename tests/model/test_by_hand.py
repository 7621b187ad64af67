"""Backward passes that are written out by hand, against finite differences in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from megatron_mm.model.layers.experts import _Experts
from megatron_mm.model.layers.gdn import convolution as gdn_conv
from megatron_mm.model.layers.gdn import delta_rule as gdn_kernels
from megatron_mm.model.layers.gdn.chunks import chunk_plan, to_cells, to_stream
from megatron_mm.model.layers.row_groups import OneByOne

LENGTHS = (9, 1, 6, 3)  # in chunks of 4: three, one, two, one; every step but the first partial


def draw(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize("size", [3, 4, 9])
def test_delta_rule(double, monkeypatch, size):
    """Two value heads share a key head; samples of several lengths and chunks."""
    monkeypatch.setattr(gdn_kernels, "chunk_length", lambda *_: size)
    total = sum(LENGTHS)
    q, k, v, a, b = draw((total, 1, 3), (total, 1, 3), (total, 2, 4), (total, 2), (total, 2))

    def rule(q, k, v, a, b):
        decay = -torch.nn.functional.softplus(a)
        return gdn_kernels.stream_delta_rule(q, k, v, decay, b.sigmoid(), LENGTHS)

    assert gradcheck(rule, (q, k, v, a, b))


def test_convolution(double):
    x, weight = draw((sum(LENGTHS), 5), (5, 4))
    assert gradcheck(lambda x, w: gdn_conv.stream_conv(x, w, LENGTHS), (x, weight))


def test_experts():
    """One of the four has no row."""
    args = draw((7, 3), (7,), (4, 2, 5, 3), (4, 3, 5))
    assert gradcheck(lambda *a: _Experts.apply(*a, OneByOne([2, 0, 4, 1])), args)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_chunks_hold_every_position_once(size):
    plan = chunk_plan(LENGTHS, size, torch.device("cpu"))
    stream = torch.arange(float(sum(LENGTHS)))
    cells = to_cells(stream, plan)
    assert torch.equal(to_stream(cells, plan), stream)
    assert len(cells) == sum(-(-n // size) for n in LENGTHS) == sum(plan.active)
    assert list(plan.active) == sorted(plan.active, reverse=True)
    # The chunk after chunk i of a step is chunk i of the next step.
    for here, after in zip(plan.steps, plan.steps[1:], strict=False):
        before = cells[here][: after.stop - after.start]
        assert torch.equal(before[:, 0] + size, cells[after][:, 0])

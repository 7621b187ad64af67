"""The same seed and name give the same tensor, whichever slice of it a rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from megatron_mm.model.multimodal import build
from megatron_mm.parallel.param_layout import constant, initialize, layouts, normal, place, uniform
from support.batches import small_run


@dataclass
class FakeGroup:
    """The part of a ProcessGroup that a layout asks for."""

    ranks: int
    mine: int

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.mine


def initialized(shape, seed=1, name="weight", init=None, **keywords) -> torch.Tensor:
    module = nn.Module()
    param = nn.Parameter(torch.full(shape, torch.nan))
    module.register_parameter(name, param)
    place(param, init or normal(1.0), **keywords)
    initialize(module, seed)
    assert param.isfinite().all()
    return param.detach()


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_slices_make_the_whole(ranks, dim):
    whole = initialized((8, 12))
    shape = [8, 12]
    shape[dim] //= ranks
    parts = [initialized(shape, split={dim: FakeGroup(ranks, r)}) for r in range(ranks)]
    assert torch.equal(torch.cat(parts, dim), whole)


def test_two_dimensions_split_over_two_groups():
    whole = initialized((4, 6))
    rows = [
        torch.cat(
            [initialized((2, 2), split={0: FakeGroup(2, i), 1: FakeGroup(3, j)}) for j in range(3)],
            dim=1,
        )
        for i in range(2)
    ]
    assert torch.equal(torch.cat(rows), whole)


def test_each_half_of_a_glu_is_split_by_itself():
    """Gate rows 0..7, up rows 8..15: rank 1 of 2 holds gate rows 4..7 and up rows 12..15."""
    whole = initialized((16, 3), view=(2, 8, 3))
    for rank in range(2):
        mine = initialized((8, 3), view=(2, 4, 3), split={1: FakeGroup(2, rank)})
        gate, up = whole[:8], whole[8:]
        rows = slice(4 * rank, 4 * rank + 4)
        assert torch.equal(mine, torch.cat((gate[rows], up[rows])))


def test_seed_and_name_matter():
    whole = initialized((5, 5))
    assert torch.equal(initialized((5, 5)), whole)
    assert not torch.isclose(initialized((5, 5), seed=2), whole).any()
    assert not torch.isclose(initialized((5, 5), name="weight2"), whole).any()


def test_wrapping_does_not_change_a_name():
    """Wrappers such as DDP prefix `module.`."""
    inner = nn.Module()
    inner.weight = nn.Parameter(torch.empty(5, 5))
    place(inner.weight, normal(1.0))
    outer = nn.Module()
    outer.module = inner
    initialize(outer, seed=1)
    assert torch.equal(inner.weight, initialized((5, 5)))


def test_experts_are_drawn_one_at_a_time():
    """So that an expert is the same in a larger model, and a rank draws only its own."""
    drawn = []

    def init(tensor, generator):
        drawn.append(tuple(tensor.shape))
        tensor.normal_(generator=generator)

    few = initialized((4, 2, 6, 3), init=init, rows_drawn_alone=True)
    assert drawn == [(2, 6, 3)] * 4
    many = initialized((8, 2, 6, 3), init=init, rows_drawn_alone=True)
    assert torch.equal(many[:4], few)
    assert not torch.isclose(many[0], many[1]).any()
    drawn.clear()
    split = {0: FakeGroup(4, 2), 2: FakeGroup(2, 1)}
    mine = initialized((2, 2, 3, 3), init=init, rows_drawn_alone=True, split=split)
    assert drawn == [(2, 6, 3)] * 2
    assert torch.equal(mine, many[4:6, :, 3:])


def test_distributions():
    # The standard deviation of n normal draws is off by std / sqrt(2 n): 0.2 % here; five of
    # those allowed. The mean is off by std / sqrt(n).
    draws = initialized((400, 250), init=normal(0.3))
    assert draws.std() == pytest.approx(0.3, rel=0.011)
    assert abs(draws.mean()) <= 5 * 0.3 / 400
    assert torch.equal(initialized((3,), init=constant(0.25)), torch.full((3,), 0.25))
    draws = initialized((400, 250), init=uniform(-2.0, 6.0))
    assert draws.min() >= -2.0 and draws.max() <= 6.0
    # A uniform mean of n draws is off by width / sqrt(12 n).
    assert draws.mean() == pytest.approx(2.0, abs=5 * 8 / (12 * 100_000) ** 0.5)
    rates = initialized((1000,), init=uniform(0.01, 16.0, then=torch.log)).exp()
    assert 0.009 < rates.min() < 0.2 and 15.8 < rates.max() <= 16.001


def test_a_parameter_without_a_layout_is_refused():
    with pytest.raises(ValueError, match="weight has no layout"):
        list(layouts(nn.Linear(2, 2)))


def test_a_view_must_hold_the_parameter():
    with pytest.raises(ValueError, match="view"):
        place(nn.Parameter(torch.empty(4, 3)), normal(1.0), view=(2, 3))


def test_every_parameter_of_the_model_has_a_layout(pg):
    model = build(small_run(), pg)[0]
    found = {name: (param, layout) for name, param, layout in layouts(model)}
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, (param, layout) in found.items():
        assert layout.local_shape == layout.global_shape, name  # one rank holds everything
        assert param.numel() == torch.Size(layout.global_shape).numel(), name
        assert param.isfinite().all(), name


STDS = {  # of small_run: init_method_std 0.1, four layers; vision_init_method_std 0.1
    "embedding.weight": 0.1,
    "output_layer.weight": 0.1,
    "language.layers.0.mixer.inner.in_proj.weight": 0.1,
    "language.layers.0.mixer.inner.out_proj.weight": 0.1 / 8**0.5,
    "language.layers.1.mixer.inner.linear_qkv.weight": 0.1,
    "language.layers.1.mixer.inner.linear_proj.weight": 0.1 / 8**0.5,
    "language.layers.3.moe.inner.experts.gate_up": 0.1,
    "language.layers.3.moe.inner.experts.down": 0.1 / 8**0.5,
    "language.layers.3.moe.inner.shared_experts.linear_fc1.weight": 0.1,
    "language.layers.3.moe.inner.shared_experts.linear_fc2.weight": 0.1 / 8**0.5,
    "language.layers.3.moe.inner.router.weight": 0.1,
    "language.looks.1.linear_q.weight": 0.1,
    "language.looks.1.linear_proj.weight": 0.0,
    "vision.vit.layers.0.linear_fc1.weight": 0.1,
    "vision.memory_proj.weight": 0.1,
}


def test_the_model_starts_with_the_standard_deviations_asked_for(pg):
    params = dict(build(small_run(), pg)[0].named_parameters())
    for name, std in STDS.items():
        # Five times the sampling error std / sqrt(2 n).
        allowed = 5 * std / (2 * params[name].numel()) ** 0.5
        assert abs(params[name].std() - std) <= allowed, name

"""Our experts on Transformer Engine's grouped product, with a stand-in for it in torch.

Transformer Engine cannot be imported without CUDA's libraries. The stand-in has the calls that
test_te_calls.py holds against its signatures, and refuses what may not be asked of it.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from megatron_mm.model.core_config import language_config
from megatron_mm.model.layers.experts import GroupedExperts
from support.batches import small_run

NAME = "megatron_mm.model.backends.transformer_engine"
SIZES = {"some": [2, 0, 5, 1, 0, 3], "one": [0, 0, 1, 0, 0, 0], "none": [0] * 6}


class Grouped(nn.Module):
    """TEGroupedLinear: products of rows with weights that stand in attributes."""

    def __init__(self, num_gemms: int, *_, **__):
        super().__init__()
        for i in range(num_gemms):
            self.register_parameter(f"weight{i}", nn.Parameter(torch.empty(0)))

    def forward(self, x_RI: torch.Tensor, rows: list[int]):
        assert len(x_RI) == sum(rows) > 0
        parts = zip(x_RI.split(rows), range(len(rows)), strict=True)
        return torch.cat([part @ vars(self)[f"weight{i}"].t() for part, i in parts]), None


@pytest.fixture
def backend(monkeypatch):
    """The backend's module, on the stand-in; gone after the test."""
    names = "transformer_engine", "transformer_engine.pytorch"
    fakes = {name: ModuleType(name) for name in names}
    fakes[names[0]].pytorch = fakes[names[1]]
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, name, module)
    module = importlib.import_module(NAME)
    monkeypatch.setattr(module, "TEGroupedLinear", Grouped)
    yield module
    del sys.modules[NAME]


@pytest.mark.parametrize("scoped", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_they_compute_what_torch_does(backend, pg, sizes, scoped):
    """Output and every gradient, also where no row is there: zeros, but there."""
    config, counts = language_config(small_run()), torch.tensor(SIZES[sizes])
    made = [
        kind(6, config, pg_collection=pg, std=0.1, out_std=0.1)
        for kind in (backend.TEGroupedExperts, GroupedExperts)
    ]
    generator = torch.Generator().manual_seed(0)
    total = int(counts.sum())
    x_RH = torch.randn(total, 64, generator=generator, dtype=torch.float64)
    probs_R = torch.rand(total, generator=generator, dtype=torch.float64)
    d_RH = torch.randn(total, 64, generator=generator, dtype=torch.float64)
    if scoped:
        probs_R = probs_R * torch.where(torch.arange(total) % 2 == 0, 1.0, -1.0)
    found = []
    for experts in made:
        experts.double().scoped = scoped
        for param in (experts.gate_up, experts.down):
            param.data.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(param.dim()))
        given = x_RH.clone().requires_grad_(), probs_R.clone().requires_grad_()
        out, _ = experts(given[0], counts, given[1])
        (out * d_RH).sum().backward()
        learnt = [x.grad for x in (*given, experts.gate_up, experts.down)]
        found.append([out.detach(), *learnt])
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape
        # fp64: products of at most 64 terms of up to 100 each, the probability multiplied before or
        # after. In fp32 a sum that ends near zero keeps too few digits for any close bound.
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)

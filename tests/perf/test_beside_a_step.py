"""A plan and a step in one process: neither leaves anything to the other."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from support.planned_layouts import layout_run, planned


@pytest.mark.parametrize("scale", [None, torch.tensor(0.5)], ids=["before a step", "after one"])
def test_a_plan_does_not_touch_the_scale_of_the_balancing_loss(monkeypatch, scale):
    """megatron-core keeps it in a class. A plan beside a step copied a tensor without data into it,
    and a step behind a plan multiplied by one."""
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", scale)
    (plan,) = planned(layout_run({}, 1), 1)
    assert plan.traces and MoEAuxLossAutoScaler.main_loss_backward_scale is scale

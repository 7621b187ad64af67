"""Arguments of flash-linear-attention's kernels, seen by kernels that only look at it."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from megatron_mm.model.layers.gdn.fla import convolve_and_scan_fla
from megatron_mm.model.layers.gdn.mix import HeadWidths
from megatron_mm.model.segments import Segments

WIDTHS, HEADS, TOKENS = HeadWidths(4, 6, 2), 3, 9


@pytest.fixture
def given(monkeypatch) -> list[dict]:
    """The arguments of every call, in order."""
    calls: list[dict] = []

    def causal_conv1d(**arguments):
        calls.append(arguments)
        return arguments["x"], None

    def chunk_gated_delta_rule(**arguments):
        calls.append(arguments)
        return arguments["v"], None

    for name, kernel in (
        ("fla.modules.causal_conv1d", causal_conv1d),
        ("fla.ops.gated_delta_rule", chunk_gated_delta_rule),
    ):
        parts = name.split(".")
        for n in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:n]), types.ModuleType(parts[n - 1]))
        module = types.ModuleType(name)
        setattr(module, kernel.__name__, kernel)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_boundaries_come_from_the_cpu_too_and_are_the_same_in_every_layer(given):
    segments = Segments.from_cu_seqlens(torch.tensor([0, 4, 4, 5, TOKENS]), "meta")
    channels = HEADS * sum(WIDTHS.rows)
    for _ in range(2):  # two layers
        convolve_and_scan_fla(
            torch.zeros(TOKENS, channels, device="meta"),
            torch.zeros(channels, 4, device="meta"),
            torch.zeros(TOKENS, 2 * HEADS, device="meta"),
            torch.zeros(TOKENS, 2 * HEADS, device="meta"),
            segments,
            WIDTHS,
        )
    assert len(given) == 4
    for call in given:
        # Without the empty sample.
        assert call["cu_seqlens_cpu"].tolist() == [0, 4, 5, TOKENS]
        assert call["cu_seqlens"].is_meta and call["cu_seqlens"].shape == (4,)
        assert call["cu_seqlens_cpu"] is given[0]["cu_seqlens_cpu"]
        assert call["cu_seqlens"] is given[0]["cu_seqlens"]

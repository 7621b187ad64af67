"""Arguments of flash-linear-attention's kernels, seen by kernels that only look at it."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from megatron_mm.model.layers.gdn.fla import convolve_and_scan_fla, convolve_and_step_fla
from megatron_mm.model.layers.gdn.mix import HeadWidths
from megatron_mm.model.layers.gdn.step import convolve_and_step
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

    def fused_recurrent_gated_delta_rule(**arguments):
        calls.append(arguments)
        return recurrence(**arguments)

    for name, kernel in (
        ("fla.modules.causal_conv1d", causal_conv1d),
        ("fla.ops.gated_delta_rule", chunk_gated_delta_rule),
        ("fla.ops.gated_delta_rule", fused_recurrent_gated_delta_rule),
    ):
        parts = name.split(".")
        for n in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:n]), types.ModuleType(parts[n - 1]))
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        setattr(sys.modules[name], kernel.__name__, kernel)
    return calls


def recurrence(q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel):
    """flash-linear-attention's recurrence as its documentation has it, [B, T, heads, width], for
    one position: grouped values, states [B, value heads, K, V]."""
    assert output_final_state and use_qk_l2norm_in_kernel and q.shape[1] == 1
    each = v.shape[2] // q.shape[2]
    q, k = (F.normalize(x[:, 0], dim=-1, eps=0).repeat_interleave(each, 1) for x in (q, k))
    state = initial_state * g[:, 0, :, None, None].exp()
    new = beta[:, 0, :, None] * (v[:, 0] - torch.einsum("bhk,bhkv->bhv", k, state))
    state = state + k.unsqueeze(3) * new.unsqueeze(2)
    found = torch.einsum("bhk,bhkv->bhv", q * q.shape[-1] ** -0.5, state)
    return found.unsqueeze(1), state


def test_a_step_with_the_recurrent_kernel_is_torchs(given):
    g = torch.Generator().manual_seed(0)
    rows, channels = 5, HEADS * sum(WIDTHS.rows)
    x, taps = torch.randn(rows, channels, generator=g), torch.randn(4, channels, generator=g)
    log_decay, beta = torch.rand(2, rows, 2 * HEADS, generator=g).unbind()
    log_decay = -log_decay
    inputs = torch.randn(rows, 3, channels, generator=g)
    state = torch.randn(rows, HEADS, WIDTHS.values, WIDTHS.key, WIDTHS.value, generator=g)
    found = []
    for step in (convolve_and_step, convolve_and_step_fla):
        held = inputs.clone(), state.clone()
        found.append((step(x, taps, log_decay, beta, *held, WIDTHS), *held))
    assert len(given) == 1
    for ours, theirs in zip(*found, strict=True):
        # fp32 sums of 4 terms in another order, and 1e-6 beside the squares in ours.
        assert (ours - theirs).abs().max() <= 1e-5
    assert not torch.equal(found[1][2], state)


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
        assert call["chunk_indices"] is given[0]["chunk_indices"]


def test_chunks_do_not_cross_samples():
    """By hand, and as flash-linear-attention's `prepare_chunk_indices` counts them."""
    ends = torch.tensor([0, 130, 130, 194, 195])
    chunks = Segments.from_cu_seqlens(ends).chunks
    assert chunks.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [2, 0]]

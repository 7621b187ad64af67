"""What is handed to torch's kernel for packed streams, by a kernel written out for the CPU."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import varlen as torchs

from megatron_mm import platform
from megatron_mm.model.layers import varlen
from megatron_mm.model.layers.attention import causal_attention
from megatron_mm.model.layers.clvr import memory_attention
from megatron_mm.model.memory_map import MemoryMap
from megatron_mm.model.segments import Segments
from tools.fake_gpu import varlen as kernel

# fp64 sums of up to 300 products of numbers of size 1.
ROUNDING = 1e-12


@pytest.fixture
def packed(monkeypatch):
    """Returns a function that switches the packed way on and off."""
    kernel.install()

    def switch(on: bool) -> None:
        monkeypatch.setattr(varlen, "suits", lambda query: on)

    return switch


def with_gradients(function, inputs, d_out):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(d_out)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def check(function, inputs, packed) -> list[torch.Tensor]:
    """Both ways give the same result and gradients; returns them."""
    d_out = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(9)).double()
    found = []
    for on in (True, False):
        packed(on)
        found.append(with_gradients(function, inputs, d_out))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=ROUNDING)
    return found[0]


def randoms(*shapes) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("lengths", [(300,), (70, 0, 5, 117, 1), (1, 1, 1)])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_self_attention(packed, lengths, groups):
    segments = Segments.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0))
    total = segments.total
    inputs = randoms((total, 4, 8), (total, groups, 8), (total, groups, 8))
    check(lambda *x: causal_attention(*x, segments), inputs, packed)


STREAMS = {
    "one image": [(20, {4: 6})],
    "its last position": [(9, {9: 3}), (5, {2: 4})],
    "three images, one, none, two": [
        (40, {3: 5, 10: 7, 11: 2}),
        (12, {6: 4}),
        (8, {}),
        (30, {0: 3, 25: 9}),
    ],
    "one image before two together as large": [(10, {2: 8}), (10, {3: 4, 6: 4})],
    "images at once": [(16, {2: 3, 9: 4}), (6, {1: 2, 2: 2, 3: 2, 4: 2})],
}


def looking(stream: list[tuple[int, dict[int, int]]], piece: slice, rows_more: int):
    """The map of a part of the stream, and bool [T of the part, M]: who sees what.

    Args:
        stream: of each sample its length, and {position from which an image is seen: its patches}.
    """
    total = sum(length for length, _ in stream)
    visible, sees, start = [], [], 0
    at = torch.arange(total)
    for length, images in stream:
        for since, patches in images.items():
            visible += [[start + since, start + length]] * patches
            seen = (at >= start + since) & (at < start + length)
            sees += [seen] * patches
        start += length
    segments = Segments.from_cu_seqlens(torch.tensor([0, *(n for n, _ in stream)]).cumsum(0))
    local = segments.within(range(total)[piece])
    patches = len(visible)
    map_ = MemoryMap.build(
        segments, local, torch.tensor(visible), torch.rand(patches, 2), patches + rows_more
    )
    return map_, torch.stack(sees, 1)[piece]


def written_out(query, key, value, sees):
    scores = torch.einsum("thd,mhd->htm", query, key[: sees.shape[1]]) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    weights = torch.where(sees.any(1)[:, None], weights, 0.0)
    return torch.einsum("htm,mhd->thd", weights, value[: sees.shape[1]])


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("piece", [slice(None), slice(5, 18), slice(3, 9)])
@pytest.mark.parametrize("rows_more", [0, 5])
def test_a_look(packed, name, piece, rows_more):
    """Whole streams, and pieces as context parallelism cuts them; a memory with padding rows."""
    map_, sees = looking(STREAMS[name], piece, rows_more)
    rows = sees.shape[1] + rows_more
    # Keys and values as they come out of their projection: every second run of features.
    query, both = randoms((len(sees), 2, 8), (rows, 2, 16))

    def look(query, both):
        return memory_attention(query, *both.chunk(2, -1), map_)

    out, *gradients = check(look, [query, both], packed)
    key, value = both.chunk(2, -1)
    torch.testing.assert_close(out, written_out(query, key, value, sees), rtol=0, atol=ROUNDING)
    assert not out[~sees.any(1)].any()
    assert not gradients[1][: sees.shape[1]][~sees.any(0)].any()
    assert not gradients[1][sees.shape[1] :].any()


@pytest.mark.parametrize(
    ("dtype", "width", "capability", "taken"),
    [
        (torch.bfloat16, 256, (9, 0), True),  # Qwen3-Next's attention
        (torch.bfloat16, 128, (8, 0), True),
        (torch.float16, 64, (10, 0), True),
        (torch.float32, 128, (9, 0), False),
        (torch.bfloat16, 100, (9, 0), False),
        (torch.bfloat16, 264, (9, 0), False),
        (torch.bfloat16, 208, (8, 6), False),
        (torch.bfloat16, 128, (7, 5), False),
    ],
)
def test_what_the_kernel_takes(monkeypatch, dtype, width, capability, taken):
    query = torch.zeros(3, 2, width, dtype=dtype)
    assert not varlen.suits(query)
    monkeypatch.setattr(platform, "compute_capability", lambda device: capability)
    assert varlen.suits(query) is taken


def test_a_newer_torch_is_told_that_heads_are_grouped(monkeypatch):
    """From 2.12 on it refuses fewer heads of keys than of queries without the word."""
    told = []

    def newer(query, *args, enable_gqa: bool = False, **kwargs):
        told.append(enable_gqa)
        return query

    monkeypatch.setattr(torchs, "varlen_attn", newer)
    spec = importlib.util.spec_from_file_location("varlen_of_another_torch", varlen.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    bounds = SimpleNamespace(queries=None, keys=None, most_queries=3, most_keys=3)
    fresh.attend(*randoms((3, 4, 8), (3, 2, 8), (3, 2, 8)), bounds)
    assert told == [True] and varlen.GROUPED == {}  # the tested torch has no such word

"""The memory of a look is linear in tokens and patches, seen at torch's dispatcher."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_mm.config import preset
from megatron_mm.config.cost import patches
from megatron_mm.model.layers import varlen
from megatron_mm.model.layers.clvr import memory_attention
from megatron_mm.model.memory_map import MemoryMap
from megatron_mm.model.segments import Segments
from megatron_mm.perf.recorder import Recorder
from megatron_mm.perf.standins import fused_kernels
from tools.fake_gpu import varlen as kernel


def stream_of(lengths: list[int], images: int, patches: int, device: str):
    """The map of samples with `images` images each, of `patches` patches, spread over them."""
    visible, start = [], 0
    for length in lengths:
        for image in range(images):
            since = start + (image + 1) * length // (images + 1)
            visible.append(torch.tensor([[since, start + length]]).expand(patches, 2))
        start += length
    segments = Segments.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0), device)
    rows = len(lengths) * images * patches
    coordinates = torch.zeros(rows, 2)
    return MemoryMap.build(segments, segments, torch.cat(visible), coordinates, rows)


def peak(map_: MemoryMap, heads: int, width: int, dtype: torch.dtype, device: str) -> int:
    """Bytes that a look's attention holds at most, forward and backward, beside its inputs."""
    query = torch.zeros(map_.local.total, heads, width, dtype=dtype, device=device)
    key, value = (
        torch.zeros(map_.patches.total, heads, width, dtype=dtype, device=device) for _ in "kv"
    )
    leaves = [x.requires_grad_() for x in (query, key, value)]
    recorder = Recorder(SimpleNamespace())
    with fused_kernels(recorder.add), recorder:
        out = memory_attention(*leaves, map_)
        out.backward(torch.empty_like(out))
    return recorder.peak


def test_the_look_of_mm_80b_at_32k_tokens():
    """20 images of 13 tiles: a mask would have 32,768 x 266,240 entries, 8.7 GB as bool, and twice
    that as a bias in bf16. Now: the gradients of queries, keys and values, twice while they are
    added up, and results, sums and gathered queries of T."""
    model = preset("mm-80b")
    heads, width = model.fusion.clvr_num_attention_heads, model.fusion.clvr_kv_channels
    tokens, images = 32_768, 20
    map_ = stream_of([tokens], images, 13 * patches(model), "meta")
    assert map_.patches.total == 266_240
    row = 2 * heads * width
    found = peak(map_, heads, width, torch.bfloat16, "meta")
    assert found <= 6 * row * (tokens + map_.patches.total)
    assert found < tokens * map_.patches.total  # of one byte each


@pytest.mark.parametrize("packed", [False, True])
def test_twice_the_stream_is_twice_the_memory(monkeypatch, packed):
    kernel.install()
    monkeypatch.setattr(varlen, "suits", lambda query: packed)
    one, two = (
        peak(stream_of([64 * n] * 3, 4 * n, 16, "cpu"), 2, 8, torch.float32, "cpu") for n in (2, 4)
    )
    # Of the packed kernel only what it returns is seen; the stand-in works in segments.
    assert one <= two <= 2.1 * one

"""Measures how the cost of a decoding step grows with the position, for each kind of mixer."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from megatron_mm.benchmark.measure import interleave, ratios
from megatron_mm.config import RunConfig
from megatron_mm.engine.engine import Engine
from megatron_mm.model.decode import DecodeCache, Filling
from megatron_mm.model.layers.attention import KeysAndValues
from megatron_mm.model.layers.gdn.layer import DeltaState
from megatron_mm.model.segments import Segments
from megatron_mm.parallel.groups import Groups

NEAR, FAR = 16, 512
CALLS = 50  # per timing


def growth(run: RunConfig, groups: Groups, rows: int, rounds: int, warmup: int) -> dict[str, Any]:
    """Returns the cost of a token at position 512 relative to position 16, in the first layer of
    each kind, for the cache and its readers without projections.

    Args:
        rows: number of rows decoded together.
    """
    engine = Engine.create(run, groups)
    cores = {"gated delta rule": _delta_core, "attention": _attention_core}
    found: dict[str, Any] = {}
    with torch.no_grad():
        for kind, make in cores.items():
            near, far = (make(engine, rows, position) for position in (NEAR, FAR))
            runs = interleave([_often(f) for f in (near, far)], rounds + warmup)
            first, last = (side[warmup:] for side in runs)
            microseconds = 1e6 * statistics.median(run.seconds for run in first) / CALLS
            found[kind] = {"microseconds_at_16": round(microseconds, 1)} | ratios(last, first)
    return found


def _often(function: Callable[[], Any]) -> Callable[[int], None]:
    """Returns a side of `interleave` that calls `function` many times."""

    def side(number: int) -> None:
        del number
        for _ in range(CALLS):
            function()

    return side


def _at(rows: int, position: int) -> DecodeCache:
    """Returns a cache whose rows are about to hold a prompt of `position` tokens."""
    cache = DecodeCache(rows, Filling(torch.arange(rows), torch.zeros(rows, dtype=torch.int64)))
    cache.lengths_R[:] = position
    cache.reserve(position + 1)
    cache.read(position + 1)
    return cache


def _segments(length: int) -> Segments:
    return Segments.from_cu_seqlens(torch.tensor([0, length]), "cpu")


def _delta_core(engine: Engine, rows: int, position: int) -> Callable[[], Any]:
    layers = engine.chunks[0].language.layers.values()
    layer = next(p["mixer"].inner for p in layers if hasattr(p["mixer"].inner, "mix_step"))
    cache = _at(rows, position)
    memory = cache.state("G", 0, DeltaState)
    g = torch.Generator().manual_seed(position)

    def random(tokens: int, *shape: int) -> torch.Tensor:
        return torch.randn(tokens, *shape, generator=g)

    keys, heads = layer.key_heads, layer.A_log.shape[0]
    qkv = random(position, keys, sum(layer.widths[:3]))
    layer._mix(qkv, random(position, keys, sum(layer.widths[4:])), _segments(position), memory)
    cache.filling = None
    x, taps = random(rows, keys * sum(layer.widths[:3])), layer._constants().taps
    log_decay, beta = -random(rows, heads).abs(), random(rows, heads).sigmoid()
    held = memory.tensors["inputs"], memory.tensors["state"]
    return lambda: layer.mix_step(x, taps, log_decay, beta, *held, layer.head_widths)


def _attention_core(engine: Engine, rows: int, position: int) -> Callable[[], Any]:
    language = engine.run.model.language
    heads, width = language.num_attention_heads, language.kv_channels
    cache = _at(rows, position)
    memory = cache.state("*", 0, KeysAndValues)
    g = torch.Generator().manual_seed(position)

    def random(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, width, generator=g)

    groups = language.num_query_groups
    memory.store(random(position, groups), random(position, groups), _segments(position))
    cache.filling = None
    query, key, value = random(rows, heads), random(rows, groups), random(rows, groups)

    def step() -> torch.Tensor:
        memory.store(key, value, None)
        return memory.attend(query, cache.mask(query.dtype))

    return step

"""What one microbatch asks of the model: how many rows every product has.

`needed` is what the model's own mathematics asks for, whoever computes it and on whatever layout:
causal pairs only, the delta rule as its recurrence, no padding. `executed` is what our torch
kernels compute for it on one rank: rectangles, chunks, padding, a dummy tile for a text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_mm.config import RunConfig, effective_pattern
from megatron_mm.config.cost import causal_pairs, delta_rule, patches
from megatron_mm.data.batch import Microbatch
from megatron_mm.model.context import memory_rows
from megatron_mm.model.layers.clvr import MemoryMap
from megatron_mm.model.layers.gdn.chunks import chunk_length, chunk_plan
from megatron_mm.model.segments import Segments


@dataclass(frozen=True)
class Work:
    """
    Attributes:
        tokens: rows of every linear of the language stack.
        logits: rows of the output layer.
        attention_pairs, look_pairs: (query, key) of one layer.
        delta_forward, delta_backward: FLOPs of one layer's delta rule.
        tiles: that the ViT sees; `stream_tiles` of them enter the stream.
        patches: of the memory; `memory_rows` of them and padding are looked at.
        attention_backward: FLOPs of attention's backward pass by those of its forward pass.
        executed: count what is computed though nobody asked for it: input gradients of whatever
            megatron-core's linears were given, and what recomputation runs again.
    """

    tokens: int
    logits: int
    attention_pairs: float
    look_pairs: float
    delta_forward: float
    delta_backward: float
    tiles: int
    stream_tiles: int
    patches: int
    memory_rows: int
    attention_backward: float = 2.0
    executed: bool = False


def needed(run: RunConfig, batch: Microbatch, logits: int) -> Work:
    """
    Args:
        batch: with its pixels, as the replica's reader has it.
        logits: positions at which the objective wants them.
    """
    real = batch.num_real_tokens
    lengths = batch.cu_seqlens.clamp(max=real).diff().tolist()
    delta = delta_rule(run.model.language, real)
    looks = "L" in effective_pattern(run.model)
    seen, until = batch.memory_visible_M2.unbind(1) if looks else (torch.zeros(0),) * 2
    return Work(
        tokens=real,
        logits=logits,
        attention_pairs=sum(map(causal_pairs, lengths)),
        look_pairs=float((until - seen).sum()),
        delta_forward=delta,
        delta_backward=2 * delta,
        tiles=len(batch.pixels_NCHW),
        stream_tiles=len(batch.stream_tiles),
        patches=len(seen),
        memory_rows=len(seen),
    )


def executed(run: RunConfig, batch: Microbatch, logits: int) -> Work:
    """Of our torch kernels on one rank; arguments as for `needed`."""
    tokens = len(batch.tokens_T)
    segments = Segments.from_cu_seqlens(batch.cu_seqlens)
    forward, backward = _chunked_delta_rule(run, segments)
    tiles, stream_tiles, rows, memory, pairs = 0, 0, 0, 0, 0
    if run.model.vision is not None:
        empty = not len(batch.pixels_NCHW)
        tiles = len(batch.pixels_NCHW) or 1
        stream_tiles = 1 if empty else len(batch.stream_tiles)
        if "L" in effective_pattern(run.model):
            of_tile = patches(run.model)
            rows = of_tile * (1 if empty else len(batch.memory_tiles))
            memory = memory_rows(batch, run.model, 1)
            pairs = _look_pairs(batch, segments, memory)
    return Work(
        tokens=tokens,
        logits=logits,
        attention_pairs=sum(part.count * part.width**2 for part in segments.buckets.parts),
        look_pairs=pairs,
        delta_forward=forward,
        delta_backward=backward,
        tiles=tiles,
        stream_tiles=stream_tiles,
        patches=rows,
        memory_rows=memory,
        attention_backward=2.5,  # torch's kernels compute the scores again
        executed=True,
    )


def _look_pairs(batch: Microbatch, segments: Segments, rows: int) -> int:
    visible, coordinates = batch.memory_visible_M2, batch.memory_coordinates_M2
    views = MemoryMap.build(segments, segments, visible, coordinates, rows).views
    return sum(v.stream.count * v.stream.width * v.patches.width for v in views)


def _chunked_delta_rule(run: RunConfig, segments: Segments) -> tuple[float, float]:
    """(forward, backward) of model/layers/gdn/delta_rule.py: B chunks of C positions, `later` of them with
    a state to begin with. Solving for the inverse is no product and not counted."""
    lm = run.model.language
    keys, values = lm.linear_num_key_heads, lm.linear_num_value_heads
    K, V = lm.linear_key_head_dim, lm.linear_value_head_dim
    C = chunk_length(max(segments.sizes), K, V)
    active = chunk_plan(segments.sizes, C, torch.device("cpu")).active
    chunks, later = sum(active), sum(active[1:])
    by_key, by_value = 2.0 * chunks * keys * C * C * K, 2.0 * chunks * values * C * C * V
    state = 2.0 * later * values * C * K * V
    forward = 2 * by_key + 2 * by_value + 2.0 * later * values * C * C * K + 3 * state
    return forward, 4 * by_key + 4 * by_value + 6 * state

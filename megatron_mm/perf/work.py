"""Rows, pairs and mixing that one microbatch brings to the model.

`needed` is the work of the model's own mathematics, the same on every backend and layout: causal
pairs only, the delta rule as its recurrence, no padding. `executed` is the work of our torch
kernels on one rank: rectangles, chunks, padding, a dummy tile for a text.
"""

from __future__ import annotations

import torch

from megatron_mm.config import RunConfig, effective_pattern, reads_memory
from megatron_mm.config.cost import patches
from megatron_mm.config.layers.counting import Workload, causal_pairs
from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.data.batch import Microbatch
from megatron_mm.model.context import memory_rows
from megatron_mm.model.layers.clvr import MemoryMap
from megatron_mm.model.segments import Segments
from megatron_mm.plugins import import_object


def needed(run: RunConfig, batch: Microbatch, logits: int) -> Workload:
    """The work that the model's mathematics asks for.

    Args:
        batch: with its pixels, as the replica's reader has it.
        logits: positions at which the objective wants them.
    """
    real = batch.num_real_tokens
    lengths = batch.cu_seqlens.clamp(max=real).diff().tolist()
    looks = reads_memory(run.model)
    seen, until = batch.memory_visible_M2.unbind(1) if looks else (torch.zeros(0),) * 2
    kinds = LAYERS.used(effective_pattern(run.model))
    return Workload(
        tokens=real,
        logits=logits,
        attention_pairs=sum(map(causal_pairs, lengths)),
        look_pairs=float((until - seen).sum()),
        tiles=len(batch.pixels_NCHW),
        stream_tiles=len(batch.stream_tiles),
        patches=len(seen),
        memory_rows=len(seen),
        coordinate_rows=len(seen),
        mixing={kind.letter: kind.mixing(run, real) for kind in kinds if kind.mixing},
    )


def executed(run: RunConfig, batch: Microbatch, logits: int) -> Workload:
    """The work of our torch kernels on one rank; arguments as for `needed`."""
    tokens = len(batch.tokens_T)
    segments = Segments.from_cu_seqlens(batch.cu_seqlens)
    tiles, stream_tiles, rows, memory, pairs = 0, 0, 0, 0, 0
    if run.model.vision is not None:
        empty = not len(batch.pixels_NCHW)
        tiles = len(batch.pixels_NCHW) or 1
        stream_tiles = 1 if empty else len(batch.stream_tiles)
        if reads_memory(run.model):
            of_tile = patches(run.model.vision)
            rows = of_tile * (1 if empty else len(batch.memory_tiles))
            memory = memory_rows(batch, run.model, 1)
            pairs = _look_pairs(batch, segments, memory)
    return Workload(
        tokens=tokens,
        logits=logits,
        attention_pairs=sum(part.count * part.width**2 for part in segments.buckets.parts),
        look_pairs=pairs,
        tiles=tiles,
        stream_tiles=stream_tiles,
        patches=rows,
        memory_rows=memory,
        coordinate_rows=memory,
        mixing=_executed_mixing(run, segments),
        attention_backward=2.5,  # torch's kernels compute the scores again
        executed=True,
    )


def _executed_mixing(run: RunConfig, segments: Segments) -> dict[str, tuple[float, float]]:
    found = {}
    for kind in LAYERS.used(effective_pattern(run.model)):
        if kind.executed_mixing is not None:
            count = import_object(kind.executed_mixing, f"layer {kind.letter}:", kind="function")
            found[kind.letter] = count(run, segments)
        elif kind.mixing is not None:
            found[kind.letter] = kind.mixing(run, segments.total)
    return found


def _look_pairs(batch: Microbatch, segments: Segments, rows: int) -> int:
    visible, coordinates = batch.memory_visible_M2, batch.memory_coordinates_M2
    views = MemoryMap.build(segments, segments, visible, coordinates, rows).views
    return sum(v.stream.count * v.stream.width * v.patches.width for v in views)

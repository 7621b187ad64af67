"""Rows, pairs and mixing that one microbatch brings to the model.

`needed` is the work of the model's own mathematics, the same on every backend and layout: causal
pairs only, the delta rule as its recurrence, no padding. `executed` is the work of our torch
kernels on one rank: rectangles, chunks, padding, a dummy tile for a text. With the encoder beside
the pipeline the two differ in the tiles too: a microbatch needs all of its own, a rank encodes
those that were dealt to it.
"""

from __future__ import annotations

import torch

from megatron_mm.config import RunConfig, effective_pattern, read_memories
from megatron_mm.config.cost import patches
from megatron_mm.config.layers.counting import MemoryRows, Workload, causal_pairs
from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.config.layers.queries import query_settings
from megatron_mm.data.batch import BatchMemory, Microbatch
from megatron_mm.model.context import memory_rows
from megatron_mm.model.memory_map import MemoryMap
from megatron_mm.model.query_map import slot_reads
from megatron_mm.model.segments import Segments
from megatron_mm.plugins import import_object


def needed(run: RunConfig, batch: Microbatch, logits: int) -> Workload:
    """The work that the model's mathematics asks for.

    Args:
        batch: on any rank of its replica.
        logits: positions at which the objective wants them.
    """
    real = batch.num_real_tokens
    lengths = batch.cu_seqlens.clamp(max=real).diff().tolist()
    kinds = LAYERS.used(effective_pattern(run.model))
    memories, slot_A = {}, _slots(run, batch)
    for name in (memory.name for memory in read_memories(run.model)):
        seen, until = batch.memories[name].visible_M2.t().contiguous()
        count, pairs = len(seen), float((until - seen).sum())
        slots = float((torch.searchsorted(slot_A, until) - torch.searchsorted(slot_A, seen)).sum())
        memories[name] = MemoryRows(count, count, pairs, count, slots)
    return Workload(
        tokens=real,
        logits=logits,
        attention_pairs=sum(map(causal_pairs, lengths)),
        tiles=batch.num_tiles,
        stream_tiles=len(batch.stream_tiles),
        memories=memories,
        queries=len(batch.queries.positions_N),
        slots=len(slot_A),
        mixing={kind.letter: kind.mixing(run, real) for kind in kinds if kind.mixing},
    )


def executed(run: RunConfig, batch: Microbatch, logits: int) -> Workload:
    """The work of our torch kernels on one rank; arguments as for `needed`.

    Args:
        batch: with its pixels, all of them or those dealt to this rank.
    """
    tokens = len(batch.tokens_T)
    segments = Segments.from_cu_seqlens(batch.cu_seqlens)
    tiles, stream_tiles, memories, slot_A = 0, 0, {}, _slots(run, batch)
    if run.model.vision is not None:
        empty = not len(batch.pixels_NCHW)
        tiles = len(batch.pixels_NCHW) or 1
        stream_tiles = 1 if empty else len(batch.stream_tiles)
        for memory in read_memories(run.model):
            held, rows = batch.memories[memory.name], memory_rows(batch, memory, 1)
            count = patches(run.model) * (1 if empty else len(held.tiles))
            pairs = _look_pairs(held, segments, rows)
            of_slots = _slot_pairs(held, slot_A, segments, rows)
            memories[memory.name] = MemoryRows(count, rows, pairs, rows, *of_slots)
    return Workload(
        tokens=tokens,
        logits=logits,
        attention_pairs=sum(part.count * part.width**2 for part in segments.buckets.parts),
        tiles=tiles,
        stream_tiles=stream_tiles,
        memories=memories,
        queries=max(1, len(batch.queries.positions_N)),  # without any a row of zeros is computed
        slots=max(1, len(slot_A)),
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


def _slots(run: RunConfig, batch: Microbatch) -> torch.Tensor:
    """Positions of all slots, int64 [S]."""
    settings = query_settings(run.model)
    return batch.queries.slots(0 if settings is None else settings.slots)


def _slot_pairs(
    held: BatchMemory, slot_A: torch.Tensor, segments: Segments, rows: int
) -> tuple[float, float, float]:
    """`slot_pairs`, `image_patches` and `image_slots` of the rectangles of one glimpse at a
    memory."""
    if not len(slot_A):
        return 0.0, 0.0, 0.0
    everywhere = torch.arange(len(slot_A))
    reads = slot_reads(held, segments, slot_A, everywhere, rows, held.coordinates_M2.device)
    assert reads.map is not None
    rounds = [part for group in reads.map.groups for part in group.rounds]
    pairs = sum(part.queries.cells * part.patches for part in rounds)
    several = reads.images if reads.images > 1 else 0
    patches = sum(part.rows * part.patches for part in rounds)
    slots = sum(part.queries.cells for part in rounds)
    return float(pairs), float(several * patches), float(several * slots)


def _look_pairs(held: BatchMemory, segments: Segments, rows: int) -> int:
    visible, coordinates = held.visible_M2, held.coordinates_M2
    groups = MemoryMap.build(segments, segments, visible, coordinates, rows).groups
    return sum(part.queries.cells * part.patches for group in groups for part in group.rounds)

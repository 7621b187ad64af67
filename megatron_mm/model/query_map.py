"""Queries and slots of a microbatch, seen from one rank: whose rows it holds, and which patches of
a memory the slots read.

A query (letter Q) may be the last token of a rank's shard, and its slots the first of the next one.
So the rows of all queries are gathered on every tensor- and context-parallel rank; the slots are
computed by the ranks of the context-parallel part that they lie in, which split the heads.

Shapes: N queries of the stream, S slots in this context-parallel rank's part of it, M memory rows.
Without queries N is 1, without slots S is 1: a row of zeros that nothing shows, so that every
parameter takes part in every backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm import platform
from megatron_mm.data.batch import BatchMemory, Microbatch
from megatron_mm.model.memory_map import MemoryMap
from megatron_mm.model.segments import Segments
from megatron_mm.parallel.sequence import part, shard


@dataclass(frozen=True)
class SlotReads:
    """The patches of one memory that the slots of this part read.

    Attributes:
        map: over the slots instead of the stream; None: this part has none.
        places_M4: float32: y, x, log2 of the side of each patch, and the number of its image among
            those of its sample.
        images: at most so many in a sample.
    """

    map: MemoryMap | None
    places_M4: torch.Tensor
    images: int


@dataclass(frozen=True)
class QueryMap:
    """
    Attributes:
        count: N.
        asked: int64, numbers of the queries whose rows this rank holds; `asked_rows` says which
            rows of its shard they are.
        query_S: int64, the query of each slot; index_S: its place among that query's slots.
        shown: int64, which of the S slots this rank holds; `shown_rows` their rows of its shard.
        targets_N3: see `BatchQueries`.
        position_N: int64, of each query in its sample.
        mine_N: bool, whether this rank holds the query: its loss term is counted there.
        reads: by the name of the memory.
    """

    count: int
    asked: torch.Tensor
    asked_rows: torch.Tensor
    query_S: torch.Tensor
    index_S: torch.Tensor
    shown: torch.Tensor
    shown_rows: torch.Tensor
    targets_N3: torch.Tensor
    position_N: torch.Tensor
    mine_N: torch.Tensor
    reads: Mapping[str, SlotReads]

    @classmethod
    def build(
        cls,
        batch: Microbatch,
        slots: int,
        segments: Segments,
        memory_rows: Mapping[str, int],
        pg: ProcessGroupCollection,
    ) -> QueryMap:
        """
        Args:
            slots: behind each query.
            segments: of the stream.
            memory_rows: by name, the length of each padded memory that is read.
        Raises:
            ValueError: the slots of a query are not all in its sample.
        """
        device, tokens = batch.tokens_T.device, len(batch.tokens_T)
        positions_N, targets_N3 = batch.queries.positions_N, batch.queries.targets_N3
        ends = segments.starts + segments.lengths
        owner_N = torch.searchsorted(ends, positions_N, right=True)
        _check_room(positions_N, slots, ends, owner_N)
        slot_A = batch.queries.slots(slots)
        here, held = part(tokens, pg.cp), shard(tokens, pg)
        in_part = _within(slot_A, here).nonzero().flatten()
        reads = {
            name: slot_reads(batch.memories[name], segments, slot_A, in_part, rows, device)
            for name, rows in memory_rows.items()
        }
        at_S = slot_A[in_part]
        shown = _within(at_S, held).nonzero().flatten()
        mine_N = _within(positions_N, held)
        asked = mine_N.nonzero().flatten()
        asked_rows = positions_N[asked] - held.start
        if not len(in_part):
            in_part = torch.zeros(1, dtype=torch.int64)
        if not len(positions_N):
            mine_N = torch.zeros(1, dtype=torch.bool)
            targets_N3 = targets_N3.new_full((1, 3), torch.nan)
            positions_N = owner_N = torch.zeros(1, dtype=torch.int64)
        mine = platform.moved(mine_N, device)
        return cls(
            len(mine_N),
            asked=platform.moved(asked, device),
            asked_rows=platform.moved(asked_rows, device),
            query_S=platform.moved(in_part // slots, device),
            index_S=platform.moved(in_part % slots, device),
            shown=platform.moved(shown, device),
            shown_rows=platform.moved(at_S[shown] - held.start, device),
            targets_N3=platform.moved(targets_N3, device),
            position_N=platform.moved(positions_N - segments.starts[owner_N], device),
            mine_N=mine,
            reads=reads,
        )


def _within(positions: torch.Tensor, span: range) -> torch.Tensor:
    return (positions >= span.start) & (positions < span.stop)


def _check_room(
    positions_N: torch.Tensor, slots: int, ends: torch.Tensor, owner_N: torch.Tensor
) -> None:
    if not len(positions_N):
        return
    last_N = positions_N + slots
    next_N = torch.cat((positions_N[1:], ends[-1:]))
    wrong = (last_N >= ends[owner_N]) | (last_N >= next_N)
    if wrong.any():
        n = int(wrong.nonzero()[0])
        raise ValueError(
            f"query {n} stands at position {int(positions_N[n])} and its {slots} slots end at "
            f"{int(last_N[n])}; its sample ends at {int(ends[owner_N[n]])}, the next query is at "
            f"{int(next_N[n])}: a query needs all of its slots behind it"
        )


def slot_reads(
    memory: BatchMemory,
    stream: Segments,
    slot_A: torch.Tensor,
    in_part: torch.Tensor,
    rows: int,
    device: torch.device,
) -> SlotReads:
    """Returns who reads which patch of a memory, with the slots in the place of the stream: a slot
    sees what its position sees.

    Args:
        slot_A: int64, positions of all slots of the stream, ascending.
        in_part: int64, which of them are in this rank's part: consecutive ones.
        rows: of the padded memory.
        device: of the tensors that are rearranged.
    """
    ends, from_M = stream.starts + stream.lengths, memory.visible_M2[:, 0].contiguous()
    owner_M = torch.searchsorted(ends, memory.visible_M2[:, 1].contiguous())
    image_M, images = _image_numbers(owner_M, from_M)
    count = len(memory.extents_M)
    places = memory.coordinates_M2.new_zeros(rows, 4)
    places[:count, :2] = memory.coordinates_M2
    sides_M2 = torch.stack((memory.extents_M.log2(), image_M.to(memory.extents_M.dtype)), 1)
    places[:count, 2:] = platform.moved(sides_M2, device)
    if not len(in_part):
        return SlotReads(None, places, images)
    bounds = torch.cat((ends.new_zeros(1), torch.searchsorted(slot_A, ends)))
    of_samples = Segments.from_cu_seqlens(bounds, device)
    local = of_samples.within(range(int(in_part[0]), int(in_part[-1]) + 1))
    seen_from_M = torch.searchsorted(slot_A, from_M)
    map_ = MemoryMap.by_owner(of_samples, local, owner_M, seen_from_M, places[:, :2])
    return SlotReads(map_, places, images)


def _image_numbers(owner_M: torch.Tensor, from_M: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The number of each patch's image among those of its sample, and the most of a sample."""
    if not len(owner_M):
        return owner_M, 1
    pairs = torch.stack((owner_M, from_M), 1)
    images, number_M = torch.unique_consecutive(pairs, dim=0, return_inverse=True)
    owner = images[:, 0].contiguous()
    first = torch.searchsorted(owner, owner)  # of the same sample
    in_sample = torch.arange(len(owner)) - first
    return in_sample[number_M], int(in_sample.max()) + 1

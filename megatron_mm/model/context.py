"""Facts about the microbatch that every layer of a stage shares, worked out once per stage.

All of it follows from the batch's lengths and offsets, which every rank has; nothing here
crosses the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm.config import Layer, ModelConfig
from megatron_mm.data.batch import Microbatch
from megatron_mm.model.decode import DecodeCache
from megatron_mm.model.layers.clvr import MemoryMap, memory_hidden_size
from megatron_mm.model.routing import Routing
from megatron_mm.model.segments import Segments
from megatron_mm.parallel.sequence import part, shard, take


def memory_rows(batch: Microbatch, model: ModelConfig, tp_size: int) -> int:
    """Rows of the padded memory: at least one per rank, foldable to full width on the wire."""
    fold = model.language.hidden_size // memory_hidden_size(model)
    multiple = tp_size * fold
    return max(1, -(-len(batch.memory_visible_M2) // multiple)) * multiple


@dataclass
class StreamContext:
    """
    Attributes:
        segments: of the whole stream.
        local: of this context-parallel rank's part of it.
        position_ids_t: int64 [T / CP], positions inside their samples, of the part.
        padding_1t: bool, True on this rank's positions that are padding; None without padding.
        supervised_tokens: of the whole microbatch, a scalar.
        memory: for the looks of this stage, seen from the part.
        recomputing: the pass is a repetition for the backward pass.
        looks: pair -> attention weights, filled when recording (evaluation only).
        cache: of the rows being decoded.
        routing: requests to the routers, if there are any.
        watch: called with every layer and its output (parity tests, diagnostics).
        shared: results of `once`.
    """

    segments: Segments
    local: Segments
    position_ids_t: torch.Tensor
    padding_1t: torch.Tensor | None
    supervised_tokens: torch.Tensor
    memory: MemoryMap | None
    recomputing: bool = False
    looks: dict[int, list[torch.Tensor]] | None = None
    cache: DecodeCache | None = None
    routing: Routing | None = None
    watch: Callable[[Layer, torch.Tensor], None] | None = None
    shared: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def build(
        cls, batch: Microbatch, model: ModelConfig, pg: ProcessGroupCollection, with_memory: bool
    ) -> StreamContext:
        device = batch.tokens_T.device
        segments = Segments.from_cu_seqlens(batch.cu_seqlens, device)
        tokens = segments.total
        mine = part(tokens, pg.cp)
        local = segments.within(mine)
        padding = None
        # A batch of padding alone (every row was skipped) counts as tokens: the balancing loss of
        # no token is 0 / 0. Nothing in it is supervised, so neither loss has any weight.
        if 0 < batch.num_real_tokens < tokens:
            held = shard(tokens, pg)
            positions = torch.arange(held.start, held.stop, device=device)
            padding = (positions >= batch.num_real_tokens).unsqueeze(0)
        memory = None
        if with_memory:
            memory = MemoryMap.build(
                segments,
                local,
                batch.memory_visible_M2,
                batch.memory_coordinates_M2,
                memory_rows(batch, model, pg.tp.size()),
            )
        return cls(
            segments,
            local,
            take(batch.position_ids_T, mine),
            padding,
            batch.loss_mask_T.sum(),
            memory,
        )

    def once[T](self, key: Hashable, make: Callable[[], T]) -> T:
        """Returns `make()`, computed by the first layer that asks and shared by all that give the
        same key; for tables that depend on no parameter."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def look_record(self, pair: int) -> list[torch.Tensor] | None:
        return None if self.looks is None else self.looks.setdefault(pair, [])

    def tap(self, layer: Layer, hidden_t1H: torch.Tensor) -> None:
        if self.watch is not None and not self.recomputing:
            self.watch(layer, hidden_t1H)

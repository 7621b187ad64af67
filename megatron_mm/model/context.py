"""Facts about the microbatch that every layer of a stage shares, worked out once per stage.

All of them follow from the batch's lengths and offsets, which every rank has; nothing here
crosses the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm.config import Layer, Memory, ModelConfig
from megatron_mm.config.layers.queries import query_settings
from megatron_mm.data.batch import Microbatch
from megatron_mm.model.decode import DecodeCache
from megatron_mm.model.expert_scope import ExpertScope
from megatron_mm.model.layers.norms import RMSNorm
from megatron_mm.model.memory_map import MemoryMap
from megatron_mm.model.query_map import QueryMap
from megatron_mm.model.routing import Routing
from megatron_mm.model.segments import Segments
from megatron_mm.parallel.sequence import part, shard, take
from megatron_mm.report.metrics import MUTED, Metrics


def memory_rows(batch: Microbatch, memory: Memory, tp_size: int) -> int:
    """Returns the rows of a padded memory: at least one per rank, foldable to full width on the
    wire."""
    multiple = tp_size * memory.fold
    return max(1, -(-len(batch.memories[memory.name].visible_M2) // multiple)) * multiple


@dataclass
class StreamContext:
    """
    Attributes:
        segments: of the whole stream.
        local: of this context-parallel rank's part of it.
        position_ids_t: int64 [T / CP], positions inside their samples, of the part.
        padding_1t: bool, True on this rank's positions that are padding; None without padding, and
            where there is nothing else.
        loss_weight: of the whole microbatch, a scalar; see `Microbatch.loss_weight`.
        position_weight_t: of this rank's positions; see `Microbatch.position_weight_T`.
        memories: name -> who may look at which patch, for the memories that the looks of this
            stage read, seen from the part.
        recomputing: the pass is a repetition for the backward pass.
        looks: pair -> attention weights, filled when recording (evaluation only).
        cache: of the rows being decoded.
        routing: requests to the routers, if there are any.
        scope: the rows that experts learn from; None: all.
        watch: called with every layer and its output (parity tests, diagnostics).
        queries: of the stream, where a layer of this stage asks for them.
        shared: results of `once`.
        first_pass_metrics: see `metrics`.
        nothing_real: the batch is padding alone.
    """

    segments: Segments
    local: Segments
    position_ids_t: torch.Tensor
    padding_1t: torch.Tensor | None
    loss_weight: torch.Tensor
    memories: dict[str, MemoryMap]
    recomputing: bool = False
    looks: dict[int, list[torch.Tensor]] | None = None
    cache: DecodeCache | None = None
    routing: Routing | None = None
    scope: ExpertScope | None = None
    watch: Callable[[Layer, torch.Tensor], None] | None = None
    queries: QueryMap | None = None
    position_weight_t: torch.Tensor | None = None
    shared: dict[Hashable, Any] = field(default_factory=dict)
    first_pass_metrics: Metrics = MUTED
    nothing_real: bool = False

    @classmethod
    def build(
        cls,
        batch: Microbatch,
        model: ModelConfig,
        pg: ProcessGroupCollection,
        read: Iterable[Memory],
        asks: bool = False,
    ) -> StreamContext:
        """
        Args:
            read: the memories that the looks of this stage read.
            asks: whether a layer of this stage glimpses.
        """
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
        memories, rows = {}, {}
        for memory in read:
            patches = batch.memories[memory.name]
            rows[memory.name] = memory_rows(batch, memory, pg.tp.size())
            memories[memory.name] = MemoryMap.build(
                segments, local, patches.visible_M2, patches.coordinates_M2, rows[memory.name]
            )
        weight_T, weight_t = batch.position_weight_T, None
        if weight_T is not None:
            weight_t = take(weight_T, shard(tokens, pg))
        settings = query_settings(model) if asks else None
        queries = None
        if settings is not None:
            queries = QueryMap.build(batch, settings.slots, segments, rows, pg)
        return cls(
            segments,
            local,
            take(batch.position_ids_T, mine),
            padding,
            batch.loss_weight,
            memories,
            queries=queries,
            position_weight_t=weight_t,
            nothing_real=batch.num_real_tokens == 0,
        )

    @classmethod
    def of_step(cls, pg: ProcessGroupCollection, cache: DecodeCache) -> StreamContext:
        """The context of one token of every row, each a sample of its own. All of it but the
        positions is the same in every step."""
        device = cache.lengths_R.device
        mine = part(cache.rows, pg.cp)
        whole, local, nothing = cache.kept(
            "stream", lambda: _one_token_each(cache.rows, mine, device)
        )
        positions = take(cache.lengths_R, mine)
        return cls(whole, local, positions, None, nothing, {}, cache=cache)

    @property
    def known_queries(self) -> QueryMap:
        """`queries` of a stage that asks for them."""
        assert self.queries is not None
        return self.queries

    @property
    def metrics(self) -> Metrics:
        """Takes numbers from any layer: `context.metrics.mean("moe/entropy", entropy)`. A repeated
        pass adds none, nor does a pass that is not trained on."""
        return MUTED if self.recomputing else self.first_pass_metrics

    @property
    def stepping(self) -> bool:
        """Whether this is one token of every row that is decoded."""
        return self.cache is not None and self.cache.stepping

    def scale_of(self, norm: RMSNorm) -> torch.Tensor | None:
        """Returns a norm's factor in a step, where it is worked out once for all steps."""
        if self.cache is None or not self.cache.stepping:
            return None
        return self.cache.kept(norm, norm.scale)

    def once[T](self, key: Hashable, make: Callable[[], T]) -> T:
        """Returns `make()`, computed by the first layer that asks and shared by all that give the
        same key; for tables that depend on no parameter."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def look_record(self, pair: int) -> list[torch.Tensor] | None:
        """Returns the list that a look's attention weights are added to; None: none is wanted."""
        return None if self.looks is None else self.looks.setdefault(pair, [])

    def tap(self, layer: Layer, hidden_t1H: torch.Tensor) -> None:
        if self.watch is not None and not self.recomputing:
            self.watch(layer, hidden_t1H)


def _one_token_each(
    rows: int, mine: range, device: torch.device
) -> tuple[Segments, Segments, torch.Tensor]:
    """Segments of the stream and of a part of it, and the weight of its loss."""
    whole = Segments.from_cu_seqlens(torch.arange(rows + 1), device)
    return whole, whole.within(mine), torch.zeros((), device=device)

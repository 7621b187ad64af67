"""What every layer of a stage knows about the microbatch, worked out once per stage.

All of it follows from the batch's lengths and offsets, which every rank has; nothing here
crosses the wire.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.distributed import ProcessGroup

from megatron_mm.config import Layer, ModelConfig
from megatron_mm.data.batch import Microbatch
from megatron_mm.model.clvr import MemoryMap, memory_hidden_size
from megatron_mm.model.rotary import rotary_table
from megatron_mm.model.segments import Segments


def memory_rows(batch: Microbatch, model: ModelConfig, tp_size: int) -> int:
    """Rows of the padded memory: at least one per rank, foldable to full width on the wire."""
    fold = model.language.hidden_size // memory_hidden_size(model)
    multiple = tp_size * fold
    return max(1, -(-len(batch.memory_visible_M2) // multiple)) * multiple


@dataclass
class StreamContext:
    """
    Attributes:
        rotary: (cos, sin), each [T, rotary_dim] in fp32.
        padding_1t: bool, True on this rank's positions that are padding; None without padding.
        supervised_tokens: of the whole microbatch.
        looks: pair -> attention weights, filled when recording (evaluation only).
        watch: called with every layer and its output (parity tests, diagnostics).
    """

    segments: Segments
    rotary: tuple[torch.Tensor, torch.Tensor]
    padding_1t: torch.Tensor | None
    supervised_tokens: float
    memory: MemoryMap | None
    looks: dict[int, list[torch.Tensor]] | None = None
    watch: Callable[[Layer, torch.Tensor], None] | None = field(default=None)

    @classmethod
    def build(
        cls, batch: Microbatch, model: ModelConfig, tp: ProcessGroup, with_memory: bool
    ) -> StreamContext:
        language = model.language
        segments = Segments.from_cu_seqlens(batch.cu_seqlens)
        rotary_dim = int(language.kv_channels * language.rotary_percent)
        tokens = segments.total
        padding = None
        # A batch of padding alone (every row was skipped) counts as tokens: the balancing loss of
        # no token is 0 / 0. Nothing in it is supervised, so neither loss has any weight.
        if 0 < batch.num_real_tokens < tokens:
            shard = tokens // tp.size()
            first = tp.rank() * shard
            positions = torch.arange(first, first + shard, device=batch.tokens_T.device)
            padding = (positions >= batch.num_real_tokens).unsqueeze(0)
        memory = None
        if with_memory:
            memory = MemoryMap.build(
                segments,
                batch.memory_visible_M2,
                batch.memory_coordinates_M2,
                memory_rows(batch, model, tp.size()),
            )
        return cls(
            segments,
            rotary_table(batch.position_ids_T, rotary_dim, language.rotary_base),
            padding,
            float(batch.loss_mask_T.sum()),
            memory,
        )

    def look_record(self, pair: int) -> list[torch.Tensor] | None:
        return None if self.looks is None else self.looks.setdefault(pair, [])

    def tap(self, layer: Layer, hidden_t1H: torch.Tensor) -> None:
        if self.watch is not None:
            self.watch(layer, hidden_t1H)

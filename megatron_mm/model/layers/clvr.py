"""CLVR, cross-layer vision refinement: the language model looks at the image again.

A look queries a vision memory (patch features before the pixel shuffle) with the hidden state
of its layer. A model may have several memories; each look reads one. What a look finds is added
to the residual stream where the pattern says `J`, at once or several layers, or pipeline stages,
later. The out-projection starts at zero, so a model with CLVR added equals the model without
until it is trained.

Shapes: T stream, t shard of it, M memory patches, m shard of the padded memory, h local
heads, D clvr_kv_channels, C memory width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mm.config import Memory, ModelConfig, look_memories
from megatron_mm.config.layers.looks import COORDINATE_FREQUENCIES
from megatron_mm.model.context import StreamContext
from megatron_mm.model.decode import DecodeCache, LayerState
from megatron_mm.model.layers import varlen
from megatron_mm.model.layers.interface import BuildContext
from megatron_mm.model.layers.linear import column, row
from megatron_mm.model.layers.norms import RMSNorm
from megatron_mm.model.memory_map import MemoryMap
from megatron_mm.model.recompute import core
from megatron_mm.model.segments import Segments
from megatron_mm.parallel.param_layout import constant, normal
from megatron_mm.parallel.sequence import part, take

# Several times the default, so that keys begin by saying where they are: a look then chooses
# places from the first step, and what stands there can be learnt.
COORDINATE_STD = 0.2


def coordinate_features(coordinates_M2: torch.Tensor) -> torch.Tensor:
    """Returns sines and cosines of (y, x) at doubling frequencies, [M, 4 *
    COORDINATE_FREQUENCIES]."""
    exponent = torch.arange(COORDINATE_FREQUENCIES, device=coordinates_M2.device)
    angles = coordinates_M2.unsqueeze(-1) * (math.pi * 2.0**exponent)
    return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(1)


class Patches(LayerState):
    """Keys and values of the patches of every row's prompt, and what a step adds to its scores."""

    def __init__(self, cache: DecodeCache):
        super().__init__(cache)
        self.counts_R = torch.zeros(cache.rows, dtype=torch.int64)  # on the CPU

    def keep(self, rows_R: torch.Tensor) -> None:
        super().keep(rows_R)
        self.counts_R = self.counts_R[rows_R.cpu()]

    def store(self, key_MhD: torch.Tensor, value_MhD: torch.Tensor, patches: Segments) -> None:
        """Stores keys and values after a prefill's look. `patches`: those of each prompt, in the
        order of the memory."""
        for name, x in (("key", key_MhD), ("value", value_MhD)):
            self.hand_out_rectangle(name, patches.to_rectangle(x).transpose(1, 2))
        filling, key = self._filling, self.tensors["key"]
        self.counts_R[filling.rows_A] = patches.lengths[filling.prompt_A]
        count_R1 = self.counts_R.to(key.device).unsqueeze(1)
        # A row without any patch may look at all, which are zero; `blind` mends it after.
        absent_RP = (torch.arange(key.shape[2], device=key.device) >= count_R1) & (count_R1 > 0)
        mask = key.new_zeros(absent_RP.shape).masked_fill_(absent_RP, -torch.inf)
        self.hold("mask", mask[:, None, None])
        self.hold("blind", (count_R1 == 0).unsqueeze(2))

    def look(self, query_rhD: torch.Tensor, rows: range) -> torch.Tensor:
        """Attends from the tokens of these rows to all patches of their prompts, [r, h, D]; exactly
        0 without any. Every image of a prompt stands before the generated tokens."""
        key, value, mask, blind = (
            take(self.tensors[name], rows) for name in ("key", "value", "mask", "blind")
        )
        found = F.scaled_dot_product_attention(query_rhD.unsqueeze(2), key, value, attn_mask=mask)
        return found.squeeze(2).masked_fill(blind, 0.0)


class Look(nn.Module):
    """The `L` layer: cross-attention from the hidden state to one memory, [t, 1, H].

    A position that may see no patch gets exactly zero.

    Args:
        memory: the memory that this look reads.
        pair: number of the pair that this look opens.
    """

    State = Patches

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        pg: ProcessGroupCollection,
        memory: Memory,
        recompute: bool = False,
        pair: int = 0,
    ):
        super().__init__()
        self.pair, self.reads = pair, memory.name
        self.recompute, self.cp, tp = recompute, pg.cp, pg.tp
        language, fusion = model.language, model.fusion
        self.head_dim = fusion.clvr_kv_channels
        width = fusion.clvr_num_attention_heads * self.head_dim
        init, dtype = normal(language.init_method_std), config.params_dtype
        eps, sharded = language.layernorm_epsilon, config.sequence_parallel
        common = {"config": config, "init": init, "tp": tp}
        self.query_norm = RMSNorm(language.hidden_size, eps, partial_gradient=sharded, dtype=dtype)
        self.memory_norm = RMSNorm(memory.width, eps, partial_gradient=sharded, dtype=dtype)
        self.linear_q = column(language.hidden_size, width, **common)
        # Rows are [key, value] of each head, so that ranks split by head.
        self.linear_kv = column(memory.width, 2 * width, **common)
        # As in the attention layers: at the start, logits of unit size whatever the widths, so
        # that heads differ and the look can begin to choose. The heads are split over ranks.
        self.q_norm = RMSNorm(self.head_dim, eps, partial_gradient=True, dtype=dtype)
        self.k_norm = RMSNorm(self.head_dim, eps, partial_gradient=True, dtype=dtype)
        self.linear_coordinates = None
        if memory.coordinates:
            self.linear_coordinates = column(
                4 * COORDINATE_FREQUENCIES,
                width,
                gathered_input=True,
                **(common | {"init": normal(COORDINATE_STD)}),
            )
        self.linear_proj = row(
            width, language.hidden_size, config=config, init=constant(0.0), tp=tp
        )

    @classmethod
    def build(cls, given: BuildContext) -> Look:
        model, pair = given.run.model, given.layer.known_pair
        memory = look_memories(model)[given.layer.known_reader]
        again = given.recompute.core_attn
        return cls(model, given.config, given.pg, memory, again, pair)

    def run(
        self,
        hidden_t1H: torch.Tensor,
        context: StreamContext,
        state: Patches | None,
        memories: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """See `LayerModule.run`."""
        if state is not None and state.cache.stepping:
            return self.step(hidden_t1H, context, state)
        record = context.look_record(self.pair)
        return self(hidden_t1H, memories, context.memories, record, state)

    def forward(
        self,
        hidden_t1H: torch.Tensor,
        memories: Mapping[str, torch.Tensor],
        maps: Mapping[str, MemoryMap],
        record: list[torch.Tensor] | None = None,
        state: Patches | None = None,
    ) -> torch.Tensor:
        """Returns [t, 1, H] from [t, 1, H].

        Args:
            memories: by name, [m, 1, C]; the look takes the one that it reads.
            maps: by name, who may look at which of its patches.
            record: if given, extended by the attention weights of each sample that has a piece
                here, [h, its positions here, its patches].
            state: of the rows being filled.
        """
        query, _ = self.linear_q(self.query_norm(hidden_t1H))
        tokens = query.shape[0]
        query = self.q_norm(query.view(tokens, -1, self.head_dim))
        memory = maps[self.reads]
        key, value = self._keys_and_values(memories[self.reads], memory)
        if record is not None:
            record.extend(attention_weights(query, key, memory))
        if state is not None:
            state.store(key, value, memory.patches)
        found = core(self.recompute, memory_attention, query, key, value, memory)
        return self.linear_proj(found.reshape(tokens, 1, -1))[0]

    def step(
        self, hidden_r1H: torch.Tensor, context: StreamContext, state: Patches
    ) -> torch.Tensor:
        """`forward` for one token of every row, which needs neither memories nor maps."""
        normed = self.query_norm(hidden_r1H, context.scale_of(self.query_norm))
        query = self.linear_q(normed)[0]
        query = query.view(len(query), -1, self.head_dim)
        query = self.q_norm(query, context.scale_of(self.q_norm))
        found = state.look(query, part(state.cache.rows, self.cp))
        return self.linear_proj(found.reshape(len(found), 1, -1))[0]

    def _keys_and_values(
        self, memory_m1C: torch.Tensor, memory: MemoryMap
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values, each [M, h, D]."""
        fused, _ = self.linear_kv(self.memory_norm(memory_m1C))
        key, value = fused.view(len(fused), -1, 2 * self.head_dim).chunk(2, dim=-1)
        if self.linear_coordinates is not None:
            features = coordinate_features(memory.coordinates_M2).to(key.dtype)
            key = key + self.linear_coordinates(features)[0].view_as(key)
        return self.k_norm(key), value


def memory_attention(
    query_ThD: torch.Tensor, key_MhD: torch.Tensor, value_MhD: torch.Tensor, memory: MemoryMap
) -> torch.Tensor:
    """Attends from each position to the patches that it may see, [T, h, D]; exactly 0 if none."""
    if not any(memory.stairs):  # the parameters still take part, with gradients of zero
        return 0.0 * (query_ThD + key_MhD.sum() + value_MhD.sum())
    attend = _packed if varlen.suits(query_ThD) else _in_rectangles
    return attend(query_ThD, key_MhD, value_MhD, memory)


def _packed(
    query_ThD: torch.Tensor, key_MhD: torch.Tensor, value_MhD: torch.Tensor, memory: MemoryMap
) -> torch.Tensor:
    """A kernel for every round; nothing is copied but the queries."""
    packed = memory.packed
    rounds = query_ThD.index_select(0, packed.positions).split(packed.counts)
    found = [
        varlen.attend(query, key_MhD, value_MhD, bounds)
        for query, bounds in zip(rounds, packed.bounds, strict=True)
    ]
    return torch.zeros_like(query_ThD).index_copy(0, packed.positions, torch.cat(found))


def _in_rectangles(
    query_ThD: torch.Tensor, key_MhD: torch.Tensor, value_MhD: torch.Tensor, memory: MemoryMap
) -> torch.Tensor:
    """A kernel for every round of every group. A group's patches are copied once, or not at all
    if it is one sample; its rounds are views of them."""
    found = []
    for group in memory.groups:
        keys, values = (group.patches.to_rectangle(x) for x in (key_MhD, value_MhD))
        for step in group.rounds:
            seen = [_first(x, step.rows, step.patches) for x in (keys, values)]
            query, key, value = (
                x.transpose(1, 2) for x in (step.queries.to_rectangle(query_ThD), *seen)
            )
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=step.mask)
            found.append(mixed.transpose(1, 2))
    return memory.buckets.join(found)


def _first(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """x[:rows, :columns] without an operation where that is all of it."""
    return x if x.shape[:2] == (rows, columns) else x[:rows, :columns]


def attention_weights(
    query_ThD: torch.Tensor, key_MhD: torch.Tensor, memory: MemoryMap
) -> list[torch.Tensor]:
    """Returns the weights of `memory_attention` for every sample, [h, its length, its patches],
    for reports."""
    local, patches = memory.local, memory.here
    weights = []
    for stairs, start, length, first, count in zip(
        memory.stairs,
        *(x.tolist() for x in (local.starts, local.lengths, patches.starts, patches.lengths)),
        strict=True,
    ):
        of_sample = query_ThD.new_zeros(query_ThD.shape[1], length, count)
        for step in stairs:
            query = query_ThD[step.start : step.start + step.queries].transpose(0, 1)
            key = key_MhD[first : first + step.patches].transpose(0, 1)
            scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
            rows = slice(step.start - start, step.start - start + step.queries)
            of_sample[:, rows, : step.patches] = scores.softmax(-1).detach()
        weights.append(of_sample)
    return weights

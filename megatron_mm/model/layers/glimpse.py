"""Active vision: a token asks for a place of an image, the slots behind it show what is there.

A *query* is a token that the model writes (`<look>` in a text); K *slots* follow it. At letter `Q`
the hidden state of the query says where to look and how closely, or words before it do
(data/place_tokens.py), and a memory is read there (window.py); at letter `V` what was found is
added to the slots' hidden states. So a glimpse is one pass, causal and differentiable, and costs
tokens only where it is asked for. The out-projection starts at zero: a model with glimpses added
equals the model without until it is trained.

Shapes: T stream, t shard of it, N queries, S slots of this context-parallel part, K slots of a
query, M memory patches, m shard of the padded memory, h local heads, D clvr_kv_channels, C memory
width, R rows that are decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mm.config import Memory, RunConfig, look_memories
from megatron_mm.config.layers.queries import PLACE, QuerySettings, smallest_window
from megatron_mm.model.context import StreamContext
from megatron_mm.model.layers.glances import Glances, asked_of_step
from megatron_mm.model.layers.interface import BuildContext, Scheduled
from megatron_mm.model.layers.linear import ReplicatedLinear, column, row
from megatron_mm.model.layers.norms import RMSNorm
from megatron_mm.model.layers.window import Patches, Window, place, random_place, read, with_floor
from megatron_mm.model.query_map import QueryMap, SlotReads
from megatron_mm.model.recompute import core
from megatron_mm.parallel.param_layout import Initializer, constant, normal
from megatron_mm.parallel.param_layout import place as lay_out
from megatron_mm.parallel.sequence import both_ways, part, take

FIRST_SCALE = 0.0  # halfway, in octaves, between the smallest window and the whole image


def _first_place() -> Initializer:
    """Zeros for y and x, which is the middle, and `FIRST_SCALE`."""
    return lambda tensor, generator: tensor.copy_(torch.tensor([0.0, 0.0, FIRST_SCALE]))


class Glimpse(nn.Module, Scheduled):
    """The `Q` layer: [t, 1, H] with what was found at the slots, zero elsewhere.

    Slots that may see no patch get exactly zero.

    Args:
        memory: the memory that it reads.
        pair: number of the pair that it opens.
    """

    State = Glances

    def __init__(
        self,
        run: RunConfig,
        config: TransformerConfig,
        pg: ProcessGroupCollection,
        memory: Memory,
        settings: QuerySettings,
        recompute: bool = False,
    ):
        super().__init__()
        self.reads, self.recompute, self.settings = memory.name, recompute, settings
        self.tp, self.cp, self.tp_cp = pg.tp, pg.cp, pg.tp_cp
        self.sequence_parallel = config.sequence_parallel
        self.window = Window(
            settings.query_grid, settings.query_spread, settings.query_scale_spread
        )
        language, fusion = run.model.language, run.model.fusion
        heads, self.head_dim = fusion.clvr_num_attention_heads, fusion.clvr_kv_channels
        width, hidden, eps = heads * self.head_dim, language.hidden_size, language.layernorm_epsilon
        init, dtype = normal(language.init_method_std), config.params_dtype
        # Every rank computes with all queries, and sees the gradient from its own heads and slots.
        common = {"partial_gradient": True, "dtype": dtype}
        self.query_norm = RMSNorm(hidden, eps, **common)
        self.linear_place = ReplicatedLinear(
            hidden, PLACE, init=constant(0.0), bias=True, dtype=dtype
        )
        lay_out(self.linear_place.weight, constant(0.0), partial_gradient=True)
        lay_out(self.linear_place.bias, _first_place(), partial_gradient=True)
        self.linear_q = column(
            hidden, width, config=config, init=init, tp=pg.tp, gathered_input=True
        )
        self.memory_norm = RMSNorm(
            memory.width, eps, partial_gradient=config.sequence_parallel, dtype=dtype
        )
        # Rows are [key, value] of each head, so that ranks split by head.
        self.linear_kv = column(memory.width, 2 * width, config=config, init=init, tp=pg.tp)
        self.q_norm, self.k_norm = (RMSNorm(self.head_dim, eps, **common) for _ in range(2))
        # How much content counts beside the place, for each head. Content from the start keeps a
        # model from learning places.
        self.content = nn.Parameter(torch.empty(heads // pg.tp.size(), dtype=dtype))
        lay_out(self.content, constant(0.0), split={0: pg.tp})
        self.linear_proj = row(
            width, hidden, config=config, init=constant(0.0), tp=pg.tp, whole_output=True
        )
        # The smallest side that a window may have follows the schedule. It is a parameter that
        # nothing learns, so that checkpoints, exports and rollouts have it.
        self.min_scale = nn.Parameter(torch.empty(1, dtype=dtype), requires_grad=False)
        lay_out(self.min_scale, constant(settings.query_first_scale), set_by_run=True)

    @classmethod
    def build(cls, given: BuildContext) -> Glimpse:
        memory = look_memories(given.run.model)[given.layer.known_reader]
        again = given.recompute.core_attn
        return cls(given.run, given.config, given.pg, memory, given.settings, again)

    @torch.no_grad()
    def at_progress(self, done: float) -> None:
        """See `Scheduled`: windows may become as small as the schedule says, and never larger
        again."""
        self.min_scale.clamp_(max=smallest_window(self.settings, done))

    def run(
        self,
        hidden_t1H: torch.Tensor,
        context: StreamContext,
        state: Glances | None,
        memories: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """See `LayerModule.run`."""
        if state is not None and state.cache.stepping:
            return self.step(hidden_t1H, state)
        return self(hidden_t1H, context, state, memories)

    def forward(
        self,
        hidden_t1H: torch.Tensor,
        context: StreamContext,
        state: Glances | None,
        memories: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """`run` for a whole stream. As a call of the module, so that DDP's hooks wait for all of
        its parameters (`overlap_param_gather`)."""
        queries = context.known_queries
        reads = queries.reads[self.reads]
        key, value = self._keys_and_values(memories[self.reads])
        if state is not None:
            state.store(key, value, reads, context.memories[self.reads].patches)
        rows_NH = self._gathered(hidden_t1H.squeeze(1), queries)
        asked_N3, query_NhD = self._ask(rows_NH, queries.position_N, queries.targets_N3)
        place_N3 = self._allowed(asked_N3)
        found_ShD = core(
            self.recompute, self._read, place_N3, query_NhD, key, value, queries, reads
        )
        shown_SH = self.linear_proj(found_ShD.flatten(1))[0]
        # Every tensor-parallel rank shows some slots of its part, and all of them made each.
        shown_SH = copy_to_tensor_model_parallel_region(shown_SH, group=self.tp)
        whole_tH = hidden_t1H.new_zeros(hidden_t1H.shape[0], hidden_t1H.shape[2])
        whole_tH = whole_tH.index_copy(
            0, queries.shown_rows, shown_SH.index_select(0, queries.shown).to(whole_tH.dtype)
        )
        return self._with_loss(whole_tH, asked_N3, queries, context).unsqueeze(1)

    def step(self, hidden_r1H: torch.Tensor, state: Glances) -> torch.Tensor:
        """`run` for one token of every row: a query looks, and a slot shows what its query
        found."""
        slot_R, rows = state.cache.slot_R, part(state.cache.rows, self.cp)
        slots, width = self.settings.slots, hidden_r1H.shape[2]
        if "asked" not in state.tensors:
            state.hold("asked", hidden_r1H.new_zeros(len(slot_R), slots, width))
            most = self.settings.max_queries
            state.hold("looked", torch.zeros(len(slot_R), most, PLACE, device=slot_R.device))
        self._look_of_step(hidden_r1H, state, rows)
        place_r = take(slot_R, rows)
        index_r = (place_r - 1).clamp(min=0)[:, None, None].expand(-1, 1, width)
        shown_r1H = take(state.tensors["asked"], rows).gather(1, index_r)
        shown_r1H = shown_r1H.masked_fill((place_r < 1)[:, None, None], 0.0)
        return take(shown_r1H, part(len(shown_r1H), self.tp))

    def _look_of_step(self, hidden_r1H: torch.Tensor, state: Glances, rows: range) -> None:
        """Keeps what the slots of rows will show whose tokens are queries, and where they look."""
        slot_R, asked_RKH = state.cache.slot_R, state.tensors["asked"]
        looked_RM3 = state.tensors["looked"]
        number_R = state.cache.asks_R.clamp(1, looked_RM3.shape[1]) - 1
        if slot_R.device.type == "cpu" and self.cp.size() == 1:
            # Whoever need not wait to know who asks computes those rows alone.
            asking = (slot_R == 0).nonzero().flatten()
            if len(asking):
                found, place_A3 = self._glance(hidden_r1H, state, lambda x: x[asking])
                asked_RKH[asking] = found.to(asked_RKH.dtype)
                looked_RM3[asking, number_R[asking]] = place_A3
            return
        # Rows may move to another context-parallel rank's part: every rank knows of all.
        found, place_R3 = (
            gather_from_sequence_parallel_region(x, group=self.cp)
            for x in self._glance(hidden_r1H, state, lambda x: take(x, rows))
        )
        asks_R11 = (slot_R == 0)[:, None, None]
        asked_RKH.copy_(torch.where(asks_R11, found.to(asked_RKH.dtype), asked_RKH))
        index_R13 = number_R[:, None, None].expand(-1, 1, PLACE)
        before_R13 = looked_RM3.gather(1, index_R13)
        looked_RM3.scatter_(1, index_R13, torch.where(asks_R11, place_R3[:, None], before_R13))

    def _glance(
        self,
        hidden_r1H: torch.Tensor,
        state: Glances,
        pick: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what the slots of some rows show if their tokens are queries, [A, K, H], and the
        places that they then ask for, fp32 [A, 3].

        Args:
            pick: takes these rows out of all R.
        """
        if self.sequence_parallel:
            hidden_r1H = gather_from_sequence_parallel_region(hidden_r1H, group=self.tp)
        position_A, targets_A3 = (pick(x) for x in asked_of_step(state.cache))
        if len(hidden_r1H) == state.cache.rows:  # else it holds just those rows
            hidden_r1H = pick(hidden_r1H)
        asked_A3, query_AhD = self._ask(hidden_r1H.squeeze(1), position_A, targets_A3)
        place_A3, slots = self._allowed(asked_A3), self.settings.slots
        patches, blind_A = state.patches(pick)
        index_AK = torch.arange(slots, device=place_A3.device).expand(len(place_A3), -1)
        found = read(
            self.window,
            query_AhD.unsqueeze(1).expand(-1, slots, -1, -1),
            place_A3.unsqueeze(1).expand(-1, slots, -1),
            index_AK,
            patches,
            self.content,
        )
        found = found.masked_fill(blind_A[:, None, None, None], 0.0)
        shown = self.linear_proj(found.flatten(2).flatten(0, 1))[0].view(len(place_A3), slots, -1)
        return shown, place_A3

    def _gathered(self, hidden_tH: torch.Tensor, queries: QueryMap) -> torch.Tensor:
        """The hidden states of all queries of the stream, [N, H], on every rank that shares it."""
        rows_NH = hidden_tH.new_zeros(queries.count, hidden_tH.shape[1])
        mine = hidden_tH.index_select(0, queries.asked_rows)
        return both_ways(rows_NH.index_copy(0, queries.asked, mine), self.tp_cp)

    def _ask(
        self, rows_NH: torch.Tensor, position_N: torch.Tensor, targets_N3: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each query asks to look, fp32 [N, 3], and for what, [N, h, D].

        Args:
            position_N: see `QueryMap`; for a control of `query_place`.
            targets_N3: see `QueryMap`; where others than hidden states say the place.
        """
        normed = self.query_norm(rows_NH)
        place_N3 = place(self.linear_place(normed), self.settings.query_min_scale)
        if self.settings.query_place == "random":  # the linear takes part, as every parameter must
            place_N3 = random_place(position_N, self.min_scale) + 0.0 * place_N3
        elif self.settings.query_place == "oracle":
            place_N3 = torch.where(targets_N3.isnan(), place_N3, targets_N3)
        elif self.settings.query_place == "tokens":  # all are known but those of padding
            place_N3 = targets_N3.nan_to_num(0.5) + 0.0 * place_N3
        query, _ = self.linear_q(normed)
        return place_N3, self.q_norm(query.view(len(rows_NH), -1, self.head_dim))

    def _allowed(self, asked_N3: torch.Tensor) -> torch.Tensor:
        """The windows that are given for those that were asked for, fp32 [N, 3]."""
        if self.settings.query_place in ("oracle", "tokens"):
            return asked_N3
        return with_floor(asked_N3, self.min_scale)

    def _keys_and_values(self, memory_m1C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all patches, each [M, h, D]."""
        fused, _ = self.linear_kv(self.memory_norm(memory_m1C))
        key, value = fused.view(len(fused), -1, 2 * self.head_dim).chunk(2, dim=-1)
        return self.k_norm(key), value

    def _read(
        self,
        place_N3: torch.Tensor,
        query_NhD: torch.Tensor,
        key_MhD: torch.Tensor,
        value_MhD: torch.Tensor,
        queries: QueryMap,
        reads: SlotReads,
    ) -> torch.Tensor:
        """Returns what each slot of this part finds, [S, h, D]; zero where it may see nothing."""
        query_ShD = query_NhD.index_select(0, queries.query_S)
        if reads.map is None or not any(reads.map.stairs):  # the parameters still take part
            nothing = key_MhD.sum() + value_MhD.sum() + place_N3.sum() + self.content.sum()
            return 0.0 * (query_ShD + nothing.to(query_ShD.dtype))
        place_S3 = place_N3.index_select(0, queries.query_S)
        found = []
        for group in reads.map.groups:
            held = [group.patches.to_rectangle(x) for x in (key_MhD, value_MhD, reads.places_M4)]
            for step in group.rounds:
                key, value, places = (x[: step.rows, : step.patches] for x in held)
                slots = (query_ShD, place_S3, queries.index_S)
                query, asked, index = (step.queries.to_rectangle(x) for x in slots)
                absent = None if step.mask is None else ~step.mask[:, 0, 0]
                image = places[..., 3].long()
                patches = Patches(key, value, places[..., :3], image, reads.images, absent)
                found.append(read(self.window, query, asked, index, patches, self.content))
        return reads.map.buckets.join(found)

    def _with_loss(
        self,
        whole_tH: torch.Tensor,
        asked_N3: torch.Tensor,
        queries: QueryMap,
        context: StreamContext,
    ) -> torch.Tensor:
        """Hangs the distance to the boxes on the output, and counts what was asked for: the floor
        of the scale is not in it."""
        if not torch.is_grad_enabled():
            return whole_tH
        mine_N, metrics = queries.mine_N, context.metrics
        scale_N = self._allowed(asked_N3)[:, 2]
        metrics.ratio("look/scale", (scale_N * mine_N).sum(), mine_N.sum())
        if self.settings.query_place == "tokens":
            return whole_tH  # its targets are what it asked for
        boxed_N = mine_N & ~queries.targets_N3.isnan().any(1)
        target_N3 = torch.where(boxed_N.unsqueeze(1), queries.targets_N3, asked_N3.detach())
        away_N = (asked_N3[:, :2] - target_N3[:, :2]).abs().sum(1)
        away_N = away_N + (asked_N3[:, 2].log() - target_N3[:, 2].log()).abs()
        away = (away_N * boxed_N).sum()
        metrics.ratio("look/box_distance", away, boxed_N.sum())
        if not self.settings.query_box_loss_coeff:
            return whole_tH
        term = self.settings.query_box_loss_coeff * away
        metrics.loss_term("look/box_loss", term)
        return MoEAuxLossAutoScaler.apply(whole_tH, term)

"""Qwen3-Next's gated attention: grouped queries, q/k norm, partial rotary, output gate.

Under context parallelism the ranks trade their part of the sequence for a part of the query
heads; a key/value group goes to every rank that has a query head of it.

Shapes: T whole stream, t this context-parallel rank's part of it, h heads of this
tensor-parallel rank, g key/value groups they belong to, n = h / CP, D kv_channels, R rows being
decoded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mm.config import LanguageConfig
from megatron_mm.model.backends.interface import Backend
from megatron_mm.model.context import StreamContext
from megatron_mm.model.decode import DecodeCache, LayerState
from megatron_mm.model.layers import varlen
from megatron_mm.model.layers.interface import BuildContext
from megatron_mm.model.layers.norms import RMSNorm
from megatron_mm.model.recompute import core
from megatron_mm.model.segments import Segments
from megatron_mm.parallel.param_layout import normal
from megatron_mm.parallel.sequence import heads_to_sequence, sequence_to_heads


class KeysAndValues(LayerState):
    """Keys and values of the positions of every row."""

    def store(
        self, key_TgD: torch.Tensor, value_TgD: torch.Tensor, segments: Segments | None
    ) -> None:
        """Stores those of the prompts; in a step (T = R) of one more position of every row."""
        self.put("key", key_TgD, segments)
        self.put("value", value_TgD, segments)

    def attend(self, query_RhD: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Attends from each row's new position to all that it holds, [R, h, D].

        Args:
            mask: `DecodeCache.mask`.
        """
        rows, heads, width = query_RhD.shape
        key, value = (self.tensors[name][:, :, : mask.shape[-1]] for name in ("key", "value"))
        # The heads of a group take the place of positions: no key is repeated for them.
        query = query_RhD.reshape(rows, key.shape[1], -1, width)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return mixed.reshape(rows, heads, width)


def rotary_table(
    position_ids_T: torch.Tensor, rotary_dim: int, base: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, rotary_dim] in fp32 (Su et al. 2021, eq. 34; halves, not pairs)."""
    exponent = torch.arange(0, rotary_dim, 2, device=position_ids_T.device).float() / rotary_dim
    angles = position_ids_T.float()[:, None] / base**exponent
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate_in_place(x_RhD: torch.Tensor, table_R2d: torch.Tensor) -> torch.Tensor:
    """`apply_rotary`, changing x. `table`: cos, and sin with its first half negated."""
    cos, sin = table_R2d.unsqueeze(2).unbind(1)
    turned = x_RhD[..., : cos.shape[-1]]
    first, second = turned.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    turned.mul_(cos).add_(swapped.mul_(sin))
    return x_RhD


def signed_table(
    positions_S: torch.Tensor, rotary_dim: int, base: float, dtype: torch.dtype
) -> torch.Tensor:
    """The table of `rotate_in_place`, [S, 2, rotary_dim]."""
    cos, sin = rotary_table(positions_S, rotary_dim, base)
    first, second = sin.chunk(2, dim=-1)
    return torch.stack((cos, torch.cat((-first, second), -1)), 1).to(dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first `cos.shape[-1]` features of x [T, heads, D]; the rest pass through."""
    rotary_dim = cos.shape[-1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1)


def causal_attention(
    query_ThD: torch.Tensor, key_ThD: torch.Tensor, value_ThD: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """Softmax attention inside each sample, [T, h, D]; key and value may have fewer heads."""
    if varlen.suits(query_ThD):
        return varlen.attend(query_ThD, key_ThD, value_ThD, segments.bounds, causal=True)
    return rectangle_attention(query_ThD, key_ThD, value_ThD, segments)


def rectangle_attention(
    query_ThD: torch.Tensor, key_ThD: torch.Tensor, value_ThD: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """`causal_attention` on rectangles of similar samples, on any device and in any precision."""
    mixed = []
    for bucket in segments.buckets.parts:
        query, key, value = (
            bucket.to_rectangle(x).transpose(1, 2) for x in (query_ThD, key_ThD, value_ThD)
        )
        found = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
        )
        mixed.append(found.transpose(1, 2))
    return segments.buckets.join(mixed)


class GatedAttention(nn.Module):
    """The `*` layer. One fused projection; the rows of query head i are its query, its gate,
    and the i-th slices of its group's key and value (D / heads of a group rows each).

    So any number of tensor-parallel ranks up to the number of query heads splits it evenly
    and in the order of the whole, with fewer groups than ranks too: then the slices are
    gathered, a few features per token, and nothing is kept or computed twice.
    """

    State = KeysAndValues

    def __init__(
        self,
        language: LanguageConfig,
        config: TransformerConfig,
        pg: ProcessGroupCollection,
        out_std: float,
        backend: Backend,
        recompute: bool = False,
    ):
        super().__init__()
        self.core_attention = backend.core_attention()
        self.rotary_dim = int(language.kv_channels * language.rotary_percent)
        self.rotary_base = language.rotary_base
        self.recompute = recompute
        self.tp, self.cp = pg.tp, pg.cp
        self.head_dim = language.kv_channels
        self.heads_per_group = language.num_attention_heads // language.num_query_groups
        self.kv_slice = self.head_dim // self.heads_per_group
        rows = language.num_attention_heads * 2 * (self.head_dim + self.kv_slice)
        init = normal(language.init_method_std)
        self.linear_qkv = backend.column(
            language.hidden_size, rows, config=config, init=init, tp=pg.tp
        )
        self.linear_proj = backend.row(
            language.num_attention_heads * self.head_dim,
            language.hidden_size,
            config=config,
            init=normal(out_std),
            tp=pg.tp,
        )
        eps, dtype = language.layernorm_epsilon, config.params_dtype
        # Every rank normalises its own heads with the one shared weight.
        self.q_norm = RMSNorm(self.head_dim, eps, partial_gradient=True, dtype=dtype)
        self.k_norm = RMSNorm(self.head_dim, eps, partial_gradient=True, dtype=dtype)

    @classmethod
    def build(cls, given: BuildContext) -> GatedAttention:
        language, again = given.run.model.language, given.recompute.core_attn
        return cls(language, given.config, given.pg, given.out_std, given.backend, again)

    def run(
        self, hidden_t1H: torch.Tensor, context: StreamContext, state: KeysAndValues | None
    ) -> torch.Tensor:
        """See `LayerModule.run`."""
        if state is not None and state.cache.stepping:
            return self.step(hidden_t1H, context, state)
        settings = self.rotary_dim, self.rotary_base
        rotary = context.once(
            ("rotary", *settings), lambda: rotary_table(context.position_ids_t, *settings)
        )
        return self(hidden_t1H, context.segments, rotary, state)

    def forward(
        self,
        hidden_t1H: torch.Tensor,
        segments: Segments,
        rotary: tuple[torch.Tensor, torch.Tensor],
        state: KeysAndValues | None = None,
    ) -> torch.Tensor:
        """[sequence shard, 1, H] -> the same; `rotary` is (cos, sin) [t, rotary_dim], `state` that
        of the rows being filled."""
        fused, _ = self.linear_qkv(hidden_t1H)
        tokens = fused.shape[0]
        fused = fused.view(tokens, -1, 2 * (self.head_dim + self.kv_slice))
        query, gate, slices = fused.split([self.head_dim, self.head_dim, 2 * self.kv_slice], -1)
        key, value = self._groups(slices)
        query = apply_rotary(self.q_norm(query), *rotary)
        key = apply_rotary(self.k_norm(key), *rotary)
        if self.cp.size() > 1:
            query, key, value = self._trade(query, key, value)
        if state is not None:
            state.store(key, value, segments)
        mixed = core(self.recompute, self.core_attention, query, key, value, segments)
        mixed = heads_to_sequence(mixed, self.cp)
        gated = (mixed * gate.sigmoid()).reshape(tokens, 1, -1)
        return self.linear_proj(gated)[0]

    def step(
        self, hidden_r1H: torch.Tensor, context: StreamContext, state: KeysAndValues
    ) -> torch.Tensor:
        """`forward` for one token of every row: queries and keys go together through norm and
        rotation, whose tables are kept, and attention reads the rows' memory."""
        cache, table = state.cache, (self.rotary_dim, self.rotary_base, hidden_r1H.dtype)
        fused, _ = self.linear_qkv(hidden_r1H)
        turned, value, gate = self._parts(fused, cache)
        heads = gate.shape[1]
        turned = F.rms_norm(turned.float(), (self.head_dim,), None, self.q_norm.eps)
        turned = turned.mul_(
            cache.kept((self, "scale"), lambda: self._scale(turned.shape[1], heads))
        )
        rotary = context.once(("rotary", *table), lambda: self._rotary(context, cache, table))
        turned = rotate_in_place(turned.to(hidden_r1H.dtype), rotary)
        query, key = turned[:, :heads], turned[:, heads:]
        if self.cp.size() > 1:
            query, key, value = self._trade(query, key, value)
        state.store(key, value, None)
        mask = context.once(("mask", query.dtype), lambda: cache.mask(query.dtype))
        mixed = heads_to_sequence(state.attend(query, mask), self.cp)
        gated = (mixed * gate.sigmoid()).reshape(len(mixed), 1, -1)
        return self.linear_proj(gated)[0]

    def _parts(self, fused_r1W: torch.Tensor, cache: DecodeCache) -> tuple[torch.Tensor, ...]:
        """(queries then keys, values, gates) [r, heads of each, D] of a step."""
        width = 2 * (self.head_dim + self.kv_slice)
        rows, heads = len(fused_r1W), fused_r1W.shape[-1] // width
        if heads < self.heads_per_group:  # a group's slices are spread over ranks
            by_head = fused_r1W.view(rows, heads, width)
            query, gate, slices = by_head.split(
                [self.head_dim, self.head_dim, 2 * self.kv_slice], -1
            )
            key, value = self._groups(slices)
            return torch.cat((query, key), 1), value, gate
        groups = heads // self.heads_per_group
        order = cache.kept((self, "order"), lambda: self._order(heads).to(fused_r1W.device))
        parts = fused_r1W.view(rows, -1).index_select(1, order).view(rows, -1, self.head_dim)
        return parts.split([heads + groups, groups, heads], 1)

    def _order(self, heads: int) -> torch.Tensor:
        """int64, where in a row of the fused projection the features of all queries stand, then
        those of keys, values and gates."""
        width = 2 * (self.head_dim + self.kv_slice)
        places = torch.arange(heads * width).view(heads, width)
        query, gate, slices = places.split([self.head_dim, self.head_dim, 2 * self.kv_slice], -1)
        of_group = slices.reshape(-1, self.heads_per_group, 2, self.kv_slice).permute(2, 0, 1, 3)
        return torch.cat([x.flatten() for x in (query, of_group, gate)])

    def _scale(self, both: int, heads: int) -> torch.Tensor:
        """fp32 [heads and groups, D], the factors of both norms."""
        scales = (self.q_norm.scale(), heads), (self.k_norm.scale(), both - heads)
        return torch.cat([scale.expand(count, -1) for scale, count in scales])

    @staticmethod
    def _rotary(
        context: StreamContext, cache: DecodeCache, table: tuple[int, float, torch.dtype]
    ) -> torch.Tensor:
        """The rows' part of the table of all positions."""
        device = cache.lengths_R.device
        whole = cache.kept(
            ("rotary", *table),
            lambda: signed_table(torch.arange(cache.room, device=device), *table),
        )
        return whole.index_select(0, context.position_ids_t)

    def _groups(self, slices_thS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [t, g, D] put together from the slices at this rank's query heads."""
        tokens, heads, width = slices_thS.shape
        wanted = range(heads // self.heads_per_group)
        if not wanted:  # the group's heads are spread over ranks
            # Gradients of the other ranks' queries come back through the gather.
            slices_thS = all_gather_last_dim_from_tensor_parallel_region(
                slices_thS.reshape(tokens, -1), group=self.tp
            )
            own = self.tp.rank() * heads // self.heads_per_group
            wanted = range(own, own + 1)
        slices = slices_thS.reshape(tokens, -1, self.heads_per_group, 2, self.kv_slice)
        whole = slices[:, wanted.start : wanted.stop].transpose(2, 3)
        key, value = whole.reshape(tokens, len(wanted), 2, self.head_dim).unbind(2)
        return key, value

    def _trade(self, query_thD: torch.Tensor, key_tgD: torch.Tensor, value_tgD: torch.Tensor):
        """(query [T, n, D], key and value [T, groups of those heads, D]) in one exchange."""
        tokens, heads, _ = query_thD.shape
        groups, size = key_tgD.shape[1], self.cp.size()
        if groups % size:  # several ranks have heads of one group: each gets it
            key_tgD, value_tgD = (
                x.repeat_interleave(size // groups, 1) for x in (key_tgD, value_tgD)
            )
        parts = [x.reshape(tokens, size, -1) for x in (query_thD, key_tgD, value_tgD)]
        traded = sequence_to_heads(torch.cat(parts, dim=-1), self.cp).squeeze(1)
        sizes = [x.shape[-1] for x in parts]
        return (x.reshape(len(x), -1, self.head_dim) for x in traded.split(sizes, dim=-1))

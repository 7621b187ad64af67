"""Qwen3-Next's gated attention: grouped queries, q/k norm, partial rotary, output gate.

Shapes: T whole stream, t this rank's sequence shard (T / TP), h local heads, D kv_channels.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.distributed import ProcessGroup

from megatron_mm.config import LanguageConfig
from megatron_mm.model.backend import Backend
from megatron_mm.model.norms import RMSNorm
from megatron_mm.model.rotary import apply_rotary
from megatron_mm.model.segments import Segments
from megatron_mm.parallel.layout import normal


class GatedAttention(nn.Module):
    """The `*` layer. One fused projection whose rows are grouped by key/value head:
    [(query, gate) of each query head of the group, key, value], so that splitting over
    tensor-parallel ranks and the order in a whole checkpoint do not depend on each other.
    """

    def __init__(
        self,
        language: LanguageConfig,
        config: TransformerConfig,
        tp: ProcessGroup,
        out_std: float,
        backend: Backend,
    ):
        super().__init__()
        self.core_attention = backend.core_attention()
        self.head_dim = language.kv_channels
        self.groups = language.num_query_groups // tp.size()
        self.heads_per_group = language.num_attention_heads // language.num_query_groups
        rows = language.num_query_groups * (2 * self.heads_per_group + 2) * self.head_dim
        init = normal(language.init_method_std)
        self.linear_qkv = backend.column(
            language.hidden_size, rows, config=config, init=init, tp=tp
        )
        self.linear_proj = backend.row(
            language.num_attention_heads * self.head_dim,
            language.hidden_size,
            config=config,
            init=normal(out_std),
            tp=tp,
        )
        eps, dtype = language.layernorm_epsilon, config.params_dtype
        # Every rank normalises its own heads with the one shared weight.
        self.q_norm = RMSNorm(self.head_dim, eps, partial_gradient=True, dtype=dtype)
        self.k_norm = RMSNorm(self.head_dim, eps, partial_gradient=True, dtype=dtype)

    def forward(
        self,
        hidden_t1H: torch.Tensor,
        segments: Segments,
        rotary: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """[t, 1, H] -> [t, 1, H]; rotary is (cos, sin) [T, rotary_dim]."""
        fused, _ = self.linear_qkv(hidden_t1H)
        tokens, per_group = fused.shape[0], self.heads_per_group
        fused = fused.view(tokens, self.groups, 2 * per_group + 2, self.head_dim)
        query_gate, key, value = fused.split([2 * per_group, 1, 1], dim=2)
        query, gate = query_gate.reshape(tokens, -1, 2 * self.head_dim).chunk(2, dim=-1)
        query = apply_rotary(self.q_norm(query), *rotary)
        key = apply_rotary(self.k_norm(key.squeeze(2)), *rotary)
        mixed = self.core_attention(query, key, value.squeeze(2), segments)
        gated = (mixed * gate.sigmoid()).reshape(tokens, 1, -1)
        return self.linear_proj(gated)[0]

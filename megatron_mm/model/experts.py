"""The routed experts of one rank, as two stacked tensors.

Stacking keeps a 512-expert layer at two parameters instead of 1,024 and lets a sharded
checkpoint re-shard experts like any other dimension. The gate and up halves are a
dimension of their own, so expert-tensor-parallel ranks split each half by itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mm.parallel.layout import normal, place


class GroupedExperts(nn.Module):
    """y = (silu(x W_gate^T) * x W_up^T * p) W_down^T for each token of each local expert.

    The interface is that of megatron-core's `MoESubmodules.experts`.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
        std: float,
        out_std: float,
    ):
        super().__init__()
        etp = pg_collection.expt_tp
        ffn = config.moe_ffn_hidden_size // etp.size()
        shape = (num_local_experts, 2, ffn, config.hidden_size)
        self.gate_up = nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
        shape = (num_local_experts, config.hidden_size, ffn)
        self.down = nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
        common = {"rows_drawn_alone": True, "expert": True}
        place(self.gate_up, normal(std), split={0: pg_collection.ep, 2: etp}, **common)
        place(self.down, normal(out_std), split={0: pg_collection.ep, 2: etp}, **common)

    def forward(
        self,
        tokens_RH: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        probs_R: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """Rows R are sorted by local expert; returns [R, H] and no bias."""
        sizes = tokens_per_expert.tolist()
        # unbind, not indexing: one gradient buffer for the stack, not one per expert
        gate_up, down = self.gate_up.flatten(1, 2).unbind(), self.down.unbind()
        outs = []
        rows = zip(tokens_RH.split(sizes), probs_R.split(sizes), strict=True)
        for expert, (x, p) in enumerate(rows):
            gate, up = F.linear(x, gate_up[expert]).chunk(2, dim=-1)
            hidden = F.silu(gate) * up * p.unsqueeze(-1).to(x.dtype)
            outs.append(F.linear(hidden, down[expert]))
        return torch.cat(outs), None

    def backward_dw(self) -> None:
        """Part of megatron-core's interface; weight gradients are never delayed here."""

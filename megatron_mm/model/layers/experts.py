"""The routed experts of one rank, as two stacked tensors.

Stacking keeps a 512-expert layer at two parameters instead of 1,024 and lets a sharded
checkpoint re-shard experts like any other dimension. The gate and up halves are a
dimension of their own, so expert-tensor-parallel ranks split each half by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.autograd.function import once_differentiable

from megatron_mm import platform
from megatron_mm.model.expert_scope import read
from megatron_mm.model.layers.row_groups import (
    InOneKernel,
    OneByOne,
    RowGroups,
    aligned,
    fits_one_kernel,
)
from megatron_mm.parallel.param_layout import normal, place


class GroupedExperts(nn.Module):
    """y = (silu(x W_gate^T) * x W_up^T * p) W_down^T for each token of each local expert.

    The interface is that of megatron-core's `MoESubmodules.experts`.
    """

    scoped = False  # in the current pass: probabilities are `expert_scope.signed`

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
        hidden, dtype = config.hidden_size, config.params_dtype
        self.gate_up = nn.Parameter(torch.empty(num_local_experts, 2, ffn, hidden, dtype=dtype))
        self.down = nn.Parameter(torch.empty(num_local_experts, hidden, ffn, dtype=dtype))
        for param, init in ((self.gate_up, normal(std)), (self.down, normal(out_std))):
            split = {0: pg_collection.ep, 2: etp}
            place(param, init, split=split, rows_drawn_alone=True, expert=True)

    def forward(
        self,
        tokens_RH: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        probs_R: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """Rows R are sorted by local expert; returns [R, H] and no bias."""
        groups = self.groups(tokens_per_expert, tokens_RH)
        probs_R, teaches_R = read(probs_R) if self.scoped else (probs_R, None)
        probs_R = probs_R.to(tokens_RH.dtype)
        weights = self.gate_up, self.down
        return _Experts.apply(tokens_RH, probs_R, *weights, groups, teaches_R), None

    def groups(self, tokens_per_expert: torch.Tensor, tokens_RH: torch.Tensor) -> RowGroups:
        """The rows of each expert, for the fastest products that there are."""
        if self.in_one_kernel(tokens_RH.dtype):
            return InOneKernel(tokens_per_expert, tokens_RH.device)
        return OneByOne(tokens_per_expert.tolist())

    def in_one_kernel(self, dtype: torch.dtype) -> bool:
        """Whether products of rows of this type are one kernel, which waits for nothing."""
        experts, hidden, ffn = self.down.shape
        capability = platform.compute_capability(self.down.device)
        return fits_one_kernel(capability, dtype, experts, (hidden, ffn))

    def backward_dw(self) -> None:
        """Part of megatron-core's interface; weight gradients are never delayed here."""

    def step(
        self, tokens_RH: torch.Tensor, ends_E: torch.Tensor, probs_R: torch.Tensor
    ) -> torch.Tensor:
        """`forward` of a decoding step, [R, H]: no gradients and, where the widths allow it, one
        operator for a product of all experts.

        Args:
            ends_E: int32, where each expert's rows end. Rows after the last are not computed.
        """
        if aligned(tokens_RH.dtype, self.down.shape[1:]):
            products: Callable[..., torch.Tensor] = partial(F.grouped_mm, offs=ends_E)
        else:
            products = OneByOne(ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()).products
        inner = products(tokens_RH, self.gate_up.flatten(1, 2).transpose(1, 2))
        gate, up = inner.chunk(2, dim=-1)
        hidden = F.silu(gate).mul_(up).mul_(probs_R.to(up.dtype).unsqueeze(-1))
        return products(hidden, self.down.transpose(1, 2))


class _Experts(torch.autograd.Function):
    """The experts' products with a backward pass by hand, because autograd keeps four [R, F]
    tensors where one [R, 2F] is enough, and collects the gradients of the experts' weights one by
    one before it stacks them. And because only so the weights can learn from some rows alone, those
    where `teaches_R` is True (`model/expert_scope.py`); None: from all.

    The matrix products are the groups' business; the rest is done for all rows at once.
    """

    @staticmethod
    def forward(ctx, x_RH, probs_R, gate_up, down, groups: RowGroups, teaches_R=None):
        inner = groups.products(x_RH, gate_up.flatten(1, 2).transpose(1, 2))
        gate, up = inner.chunk(2, dim=-1)
        hidden = F.silu(gate).mul_(up).mul_(probs_R.unsqueeze(-1))
        ctx.groups = groups
        ctx.save_for_backward(x_RH, probs_R, gate_up, down, inner, teaches_R)
        return groups.products(hidden, down.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x_RH, probs_R, gate_up, down, inner, teaches_R = ctx.saved_tensors
        groups, probs = ctx.groups, probs_R.unsqueeze(-1)
        d_out = d_out.contiguous()
        gate, up = inner.chunk(2, dim=-1)
        silu = F.silu(gate)
        hidden = silu * up
        d_hidden = groups.products(d_out, down)
        d_probs = (d_hidden * hidden).sum(-1)
        d_hidden.mul_(probs)
        d_down = d_gate_up = None
        left_out_R1 = None if teaches_R is None else ~teaches_R.unsqueeze(1)
        if ctx.needs_input_grad[3]:
            hidden.mul_(probs)
            if left_out_R1 is not None:
                hidden.masked_fill_(left_out_R1, 0.0)
            d_down = groups.weight_gradients(d_out, hidden)
        d_inner = torch.empty_like(inner)
        d_gate, d_up = d_inner.chunk(2, dim=-1)
        torch.mul(d_hidden, silu, out=d_up)
        d_gate.copy_(torch.ops.aten.silu_backward(d_hidden.mul_(up), gate))
        d_x = groups.products(d_inner, gate_up.flatten(1, 2))
        if ctx.needs_input_grad[2]:
            if left_out_R1 is not None:
                d_inner.masked_fill_(left_out_R1, 0.0)
            d_gate_up = groups.weight_gradients(d_inner, x_RH).view_as(gate_up)
        return d_x, d_probs, d_gate_up, d_down, None, None

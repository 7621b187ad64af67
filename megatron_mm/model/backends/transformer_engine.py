"""Transformer Engine's parts, through megatron-core's classes where it has them.

Under FP8 the products of the language stack run in 8 bits; parameters, gradients and what
crosses ranks between layers stay as they were. Written for Transformer Engine 2.x (read and
bound against 2.20.2). Importing this needs Transformer Engine; `choice.choose` checks first.

Shapes: T stream, h query heads, R routed rows, E local experts, F their width, H hidden.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.fp8_utils import get_fp8_align_size, get_fp8_context
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.distributed import ProcessGroup

from megatron_mm.config import BackendConfig, ConfigError
from megatron_mm.model.expert_scope import TaughtWeights, read
from megatron_mm.model.layers.experts import GroupedExperts
from megatron_mm.model.segments import Segments
from megatron_mm.parallel.param_layout import Initializer, place


def check_device(settings: BackendConfig) -> None:
    """Raises ConfigError if this GPU has no hardware for the FP8 recipe asked for."""
    if settings.fp8_format is None:
        return
    check = {
        "mxfp8": te.is_mxfp8_available,
        "blockwise": te.is_fp8_block_scaling_available,
    }.get(settings.fp8_recipe, te.is_fp8_available)
    able, reason = check(return_reason=True)
    if not able:
        raise ConfigError(
            f"fp8_recipe is {settings.fp8_recipe!r}, but this GPU cannot: {reason.splitlines()[0]}"
        )


def precision(config: TransformerConfig, layer: int | None) -> AbstractContextManager:
    """The context that a layer's forward pass runs in; layer None is the whole stage.

    Delayed scaling reduces its maxima when the outermost context is left, once a pass, so it
    alone has one around the stage (megatron-core's TransformerBlock does the same).
    """
    if layer is None:
        delayed = config.fp8 is not None and config.fp8_recipe == "delayed"
        return get_fp8_context(config) if delayed else nullcontext()
    return get_fp8_context(config, layer)


def column(
    inputs: int,
    outputs: int,
    *,
    config: TransformerConfig,
    init: Initializer,
    tp: ProcessGroup,
) -> nn.Module:
    """`linear.column` without bias."""
    layer = TEColumnParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=_leave,
        gather_output=False,
        bias=False,
        skip_bias_add=False,
        is_expert=False,
        tp_group=tp,
    )
    place(layer.weight, init, split={0: tp})
    return layer


def row(
    inputs: int,
    outputs: int,
    *,
    config: TransformerConfig,
    init: Initializer,
    tp: ProcessGroup,
) -> nn.Module:
    """`linear.row` without bias."""
    layer = TERowParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=_leave,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
        is_expert=False,
        tp_group=tp,
    )
    place(layer.weight, init, split={1: tp})
    return layer


def _leave(weight: torch.Tensor) -> None:
    """An init_method that does nothing: `parallel/param_layout.py` fills parameters, the same on
    any layout."""


def shared_expert() -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)


class PackedAttention(nn.Module):
    """`causal_attention` on the packed stream: no rectangle, FlashAttention or cuDNN, never FP8.

    One instance per layer; it has no parameters.
    """

    def __init__(self):
        super().__init__()
        # By (query heads, key/value heads, width), which the layer alone knows. Not a
        # ModuleDict: it would put Transformer Engine's empty extra state into the model's.
        self._kernels: dict[tuple[int, int, int], te.DotProductAttention] = {}

    def forward(
        self,
        query_ThD: torch.Tensor,
        key_ThD: torch.Tensor,
        value_ThD: torch.Tensor,
        segments: Segments,
    ) -> torch.Tensor:
        heads, width = query_ThD.shape[1:]
        shape = (heads, key_ThD.shape[1], width)
        if shape not in self._kernels:
            self._kernels[shape] = te.DotProductAttention(
                heads,
                width,
                num_gqa_groups=shape[1],
                attention_dropout=0.0,
                qkv_format="thd",
                attn_mask_type="padding_causal",
            )
        boundaries = segments.cu_seqlens.int()
        mixed = self._kernels[shape](
            query_ThD.contiguous(),
            key_ThD.contiguous(),
            value_ThD.contiguous(),
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            max_seqlen_q=segments.width,
            max_seqlen_kv=segments.width,
        )
        return mixed.view(query_ThD.shape)


class TEGroupedExperts(GroupedExperts):
    """The parameters of `GroupedExperts`, multiplied by Transformer Engine's grouped product.

    Transformer Engine would have a parameter per expert. Those are taken away, and for every
    forward pass the slices of our two stacks stand in their place: names, optimizer, checkpoint
    and DDP then know no difference. Its own stacked weight (`single_grouped_weight`) is
    experimental in 2.20 and lacks delayed scaling.
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
        super().__init__(
            num_local_experts,
            config,
            pg_collection=pg_collection,
            name=name,
            std=std,
            out_std=out_std,
        )
        ffn = self.down.shape[-1]
        hidden, pg = config.hidden_size, pg_collection
        self.fc1 = _without_weights(num_local_experts, hidden, 2 * ffn, config, pg)
        self.fc2 = _without_weights(num_local_experts, ffn, hidden, config, pg)
        self.padding = self.unpadding = None
        if config.fp8 is not None:
            align = get_fp8_align_size(config.fp8_recipe)
            self.padding = te.Fp8Padding(num_local_experts, align)
            self.unpadding = te.Fp8Unpadding(num_local_experts, align)

    def forward(
        self,
        tokens_RH: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        probs_R: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """Rows R are sorted by local expert; returns [R, H] and no bias.

        Where there are none, the first expert computes a row of zeros that nobody sees: grouped
        products are made for some rows, and delayed scaling wants every rank to take part.
        """
        sizes = rows = tokens_per_expert.tolist()
        nothing = not sum(sizes)
        if nothing:
            tokens_RH, probs_R = F.pad(tokens_RH, (0, 0, 0, 1)), F.pad(probs_R, (0, 1))
            sizes[0] = 1
        probs_R1 = probs_R.unsqueeze(-1)
        if self.padding is not None:
            tokens_RH, rows = self.padding(tokens_RH, sizes)
            probs_R1, _ = self.padding(probs_R1, sizes)
        teaches_R = None
        if self.scoped:  # padding is zeros, which teach nothing whatever their sign says
            probs_R, teaches_R = read(probs_R1.squeeze(-1))
            probs_R1 = probs_R.unsqueeze(-1)
        gate_up_RF = self._product(self.fc1, self.gate_up.flatten(1, 2), tokens_RH, rows, teaches_R)
        hidden_RF = weighted_bias_swiglu_impl(gate_up_RF, None, probs_R1)
        out_RH = self._product(self.fc2, self.down, hidden_RF, rows, teaches_R)
        if self.unpadding is not None:
            out_RH = self.unpadding(out_RH, sizes)
        return out_RH[:0] if nothing else out_RH, None

    def _product(
        self,
        layer: TEGroupedLinear,
        weights_EOI: torch.Tensor,
        x_RI: torch.Tensor,
        rows: list[int],
        teaches_R: torch.Tensor | None,
    ) -> torch.Tensor:
        """`_product`. Transformer Engine's weight gradient is one of all rows; where only some
        teach, it sees constants, and our own grouped product (never FP8) makes the gradient."""
        if teaches_R is None:
            return _product(layer, weights_EOI, x_RI, rows)
        out_RO = _product(layer, weights_EOI.detach(), x_RI, rows)
        groups = self.groups(torch.tensor(rows), x_RI)
        return TaughtWeights.apply(out_RO, x_RI, weights_EOI, teaches_R, groups)


def _without_weights(
    experts: int,
    inputs: int,
    outputs: int,
    config: TransformerConfig,
    pg: ProcessGroupCollection,
) -> TEGroupedLinear:
    """`experts` products [inputs] -> [outputs] of this rank alone (the dispatcher communicates),
    with room for weights but no parameters."""
    layer = TEGroupedLinear(
        experts,
        inputs,
        outputs,
        parallel_mode=None,
        config=config,
        init_method=_leave,
        bias=False,
        skip_bias_add=False,
        is_expert=True,
        pg_collection=pg,
    )
    for i in range(experts):
        delattr(layer, f"weight{i}")
    return layer


def _product(
    layer: TEGroupedLinear, weights_EOI: torch.Tensor, x: torch.Tensor, rows: list[int]
) -> torch.Tensor:
    # unbind, not indexing: one gradient buffer for the stack, not one per expert
    slices = {f"weight{i}": weight for i, weight in enumerate(weights_EOI.unbind())}
    vars(layer).update(slices)
    try:
        return layer(x, rows)[0]
    finally:  # left there they would keep this pass's graph alive
        for name in slices:
            del vars(layer)[name]

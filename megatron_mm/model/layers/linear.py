"""megatron-core's parallel linears, with the layout of every parameter described."""

from __future__ import annotations

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import nn
from torch.distributed import ProcessGroup

from megatron_mm.parallel.param_layout import Initializer, constant, place


class Column(ColumnParallelLinear):
    """megatron-core's linear, whose overhead exceeds a small matmul. Where neither gradients nor
    other ranks need it, the same product without that overhead."""

    def forward(self, input_: torch.Tensor, *args, **kwargs):
        if _plain(self) and not (args or kwargs):
            return torch.matmul(input_, self.weight.t()), None
        return super().forward(input_, *args, **kwargs)


class Row(RowParallelLinear):
    """See `Column`."""

    def forward(self, input_: torch.Tensor):
        if _plain(self):
            return torch.matmul(input_, self.weight.t()), None
        return super().forward(input_)


def _plain(layer: Column | Row) -> bool:
    return not torch.is_grad_enabled() and layer.tp_group.size() == 1 and layer.bias is None


def column(
    inputs: int,
    outputs: int,
    *,
    config: ModelParallelConfig,
    init: Initializer,
    tp: ProcessGroup,
    bias: bool = False,
    gathered_input: bool = False,
    whole_outputs: int | None = None,
) -> nn.Module:
    """y = x W^T with the outputs split over `tp`.

    Under sequence parallelism the input is this rank's shard of the sequence and is gathered
    inside. A `gathered_input` is whole on every rank already, and its gradient is this rank's
    part of a sum that the caller takes, if it is needed. Outputs past `whole_outputs` are padding.
    """
    layer = Column(
        inputs,
        outputs,
        config=config,
        init_method=None,
        bias=bias,
        tp_group=tp,
        disable_grad_reduce=gathered_input,
    )
    layer.sequence_parallel = layer.sequence_parallel and not gathered_input
    whole = None if whole_outputs is None else {0: whole_outputs}
    place(layer.weight, init, split={0: tp}, whole=whole)
    if bias:
        place(layer.bias, constant(0.0), split={0: tp}, whole=whole)
    return layer


def row(
    inputs: int,
    outputs: int,
    *,
    config: ModelParallelConfig,
    init: Initializer,
    tp: ProcessGroup,
    bias: bool = False,
    whole_inputs: int | None = None,
    whole_output: bool = False,
) -> nn.Module:
    """y = x W^T with the inputs split over `tp`; the sum is whole, or scattered over the
    sequence under sequence parallelism, unless `whole_output`: its gradient must then be whole on
    every rank. Inputs past `whole_inputs` are padding."""
    layer = Row(
        inputs,
        outputs,
        config=config,
        init_method=None,
        bias=bias,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=tp,
    )
    layer.sequence_parallel = layer.sequence_parallel and not whole_output
    whole = None if whole_inputs is None else {1: whole_inputs}
    place(layer.weight, init, split={1: tp}, whole=whole)
    if bias:
        place(layer.bias, constant(0.0), partial_gradient=config.sequence_parallel)
    return layer


def vocab_embedding(
    vocab_size: int, hidden_size: int, *, config: ModelParallelConfig, init: Initializer, tp
) -> nn.Module:
    """Tokens to vectors. Rows past the vocabulary are padding, which no token reaches."""
    padded = padded_vocab_size(vocab_size, tp)
    layer = VocabParallelEmbedding(
        padded, hidden_size, init_method=None, config=config, tp_group=tp
    )
    place(layer.weight, init, split={0: tp}, whole={0: vocab_size})
    return layer


def padded_vocab_size(vocab_size: int, tp: ProcessGroup) -> int:
    """The smallest multiple of the ranks that is no smaller than the vocabulary."""
    return -(-vocab_size // tp.size()) * tp.size()


class ReplicatedLinear(nn.Linear):
    """A small linear that every tensor-parallel rank computes in full."""

    def __init__(self, inputs: int, outputs: int, *, init: Initializer, bias: bool, dtype):
        super().__init__(inputs, outputs, bias=bias, dtype=dtype)
        place(self.weight, init)
        if bias:
            place(self.bias, constant(0.0))

    def reset_parameters(self) -> None:
        """Draws nothing, as nn.Linear would; `param_layout.initialize` or a checkpoint fills it."""

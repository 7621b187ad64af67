"""megatron-core's parallel linears, with the layout of every parameter described."""

from __future__ import annotations

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import nn
from torch.distributed import ProcessGroup

from megatron_mm.parallel.layout import Initializer, constant, place


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
    layer = ColumnParallelLinear(
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
) -> nn.Module:
    """y = x W^T with the inputs split over `tp`; the sum is whole, or scattered over the
    sequence under sequence parallelism. Inputs past `whole_inputs` are padding."""
    layer = RowParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=None,
        bias=bias,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=tp,
    )
    whole = None if whole_inputs is None else {1: whole_inputs}
    place(layer.weight, init, split={1: tp}, whole=whole)
    if bias:
        place(layer.bias, constant(0.0), partial_gradient=config.sequence_parallel)
    return layer


def vocab_embedding(
    vocab_size: int, hidden_size: int, *, config: ModelParallelConfig, init: Initializer, tp
) -> nn.Module:
    layer = VocabParallelEmbedding(
        vocab_size, hidden_size, init_method=None, config=config, tp_group=tp
    )
    place(layer.weight, init, split={0: tp})
    return layer


class ReplicatedLinear(nn.Linear):
    """A small linear that every tensor-parallel rank computes alike."""

    def __init__(self, inputs: int, outputs: int, *, init: Initializer, bias: bool, dtype):
        super().__init__(inputs, outputs, bias=bias, dtype=dtype)
        place(self.weight, init)
        if bias:
            place(self.bias, constant(0.0))

"""LoRA: low-rank adapters beside the parallel linears (Hu et al. 2021, arXiv 2106.09685).

y = W x + alpha / r * B A x (eq. 3 and section 4.1), with A [r, inputs] and B [outputs, r].
B starts at zero, so a model with adapters is the model without until a step is taken.

An adapter is a child of its linear: `...linear_qkv.lora.a` beside `...linear_qkv.weight`,
whose name and layout stay as they are, so the checkpoint of a base model still loads. A
fused projection is adapted as a whole. Routed experts, the router, the embedding, the output
layer and CLVR have no adapters.

Adapters send tensors of width r between ranks, where the linear sends the width of the model:

| linear | sequence parallel | else | replicated |
|---|---|---|---|
| outputs split | A on the shard, all-gather, B split | A on the whole, copy, B split | A |
| inputs split | A split, reduce-scatter, B on the shard | A split, all-reduce, B on the whole | B |
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import nn
from torch.distributed import ProcessGroup

from megatron_mm.config import LoraConfig
from megatron_mm.parallel.param_layout import constant, place, uniform

# Where the modules that can be a target begin, as `lora_targets` calls them.
TARGETS = {
    "language": "language.layers.",
    "vision": "vision.vit.",
    "projector": "vision.projector.",
}
# The last names of the linears of the ViT and the projector that have an adapter; those of a layer
# of the language model are its kind's (`LayerKind.lora`). A linear's split is read from its
# weight's layout.
VISION_LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def is_adapter(name: str) -> bool:
    """Whether a parameter, or a checkpoint's key, belongs to an adapter."""
    return ".lora." in name


class LoRA(nn.Module):
    """alpha / r * B A x beside one linear, split over tensor-parallel ranks as the linear is.

    Args:
        linear: has `weight`, described by `place()`, and `sequence_parallel`. It multiplies its
            input by the weight, so a linear that normalises first does not qualify.

    Raises:
        ValueError: the weight is split over ranks both ways.
    """

    def __init__(self, linear: nn.Module, rank: int, alpha: float, tp: ProcessGroup):
        super().__init__()
        weight, layout = linear.weight, linear.weight.param_layout
        self.scale, self.tp, self.sequence_parallel = alpha / rank, tp, linear.sequence_parallel
        # A GLU's outputs are two dimensions of the view: B is split within each half, like W.
        *outputs, inputs = layout.local_shape
        split = layout.split
        if len(split) > 1:
            raise ValueError(f"a weight split along dimensions {split} cannot have an adapter")
        self.splits_inputs = split == (len(outputs),)
        self.splits_outputs = bool(split) and not self.splits_inputs
        self.exchanges = not _leaves_exchange(linear)
        # Each rank has its positions' part of the gradient, or that of its share of the features.
        partial = self.sequence_parallel or not self.exchanges
        whole = {dim: layout.global_shape[dim] for dim in split}  # what is past it is padding
        like = {"dtype": weight.dtype, "device": weight.device}
        self.a = nn.Parameter(torch.empty(rank, inputs, **like))
        self.b = nn.Parameter(torch.empty(math.prod(outputs), rank, **like))
        bound = layout.global_shape[-1] ** -0.5  # the authors' code: kaiming_uniform_(a=5**0.5)
        place(
            self.a,
            uniform(-bound, bound),
            split={1: tp} if self.splits_inputs else None,
            whole={1: layout.global_shape[-1]} if self.splits_inputs else None,
            partial_gradient=partial and self.splits_outputs,
        )
        place(
            self.b,
            constant(0.0),
            split={split[0]: tp} if self.splits_outputs else None,
            whole=whole if self.splits_outputs else None,
            view=(*outputs, rank),
            partial_gradient=partial and self.splits_inputs,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The term to be added to the linear's output, from the linear's input; sequence first if
        it is split."""
        return F.linear(self._exchange(F.linear(x, self.a) * self.scale), self.b)

    def _exchange(self, narrow: torch.Tensor) -> torch.Tensor:
        if not self.exchanges:
            return narrow
        if self.splits_outputs:
            if self.sequence_parallel:
                return gather_from_sequence_parallel_region(narrow, group=self.tp)
            return copy_to_tensor_model_parallel_region(narrow, group=self.tp)
        if self.splits_inputs:
            if self.sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(narrow, group=self.tp)
            return reduce_from_tensor_model_parallel_region(narrow, group=self.tp)
        return narrow

    def update(self) -> torch.Tensor:
        """The adapter's addition to this rank's block of the weight, in fp32. No communication:
        the split side of B A is split as the weight is, and the other side is whole."""
        return self.scale * (self.b.float() @ self.a.float())


def _leaves_exchange(linear: nn.Module) -> bool:
    """Whether a linear that is split over ranks leaves it to its caller to gather inputs and reduce
    outputs, as megatron-core's shared expert has it beside the dispatcher (`parallel_mode` is of
    Transformer Engine's linears)."""
    by_caller = getattr(linear, "explicit_expert_comm", False)
    return by_caller or getattr(linear, "parallel_mode", "row") is None


def _add(linear: nn.Module, inputs: tuple, output: tuple) -> tuple:
    """Forward hook: linears return (y, bias to be added by the caller or None)."""
    y, bias = output
    return y + linear.lora(inputs[0]), bias


def add_lora(model: nn.Module, lora: LoraConfig, tp: ProcessGroup) -> None:
    """Gives every linear of every target in this stage an adapter; nothing if LoRA is off.

    Call it before parameters are initialised and wrapped; engine.optimizer.freeze() does the rest.
    """
    rank = lora.lora_rank
    if rank is None:
        return
    prefixes = tuple(prefix for target, prefix in TARGETS.items() if lora.adapts(target))
    linears = dict.fromkeys((TARGETS["vision"], TARGETS["projector"]), VISION_LINEARS)
    for name, module in model.named_modules():
        if hasattr(module, "lora_linears"):
            linears[f"{name}."] = module.lora_linears
    for name, module in [*model.named_modules()]:
        inside = next((names for place, names in linears.items() if name.startswith(place)), ())
        if name.startswith(prefixes) and name.rpartition(".")[2] in inside:
            module.lora = LoRA(module, rank, lora.lora_alpha, tp)
            module.lora.hook = module.register_forward_hook(_add)


def adapted(model: nn.Module) -> Iterator[nn.Module]:
    """Linears that have an adapter."""
    return (m for m in model.modules() if isinstance(getattr(m, "lora", None), LoRA))


@torch.no_grad()
def merge(model: nn.Module) -> int:
    """Adds every adapter to its weight, removes it, and returns how many there were in this stage.

    The sum is taken in fp32 and rounded once to the weight's precision.
    """
    linears = [*adapted(model)]
    for linear in linears:
        weight = linear.weight
        weight.copy_(weight.float() + linear.lora.update())
        linear.lora.hook.remove()
        del linear.lora
    return len(linears)

"""The parts that layers ask a backend for, whoever computes them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


@dataclass(frozen=True)
class Backend:
    """
    Attributes:
        column, row: make a parallel linear; signatures of `model/layers/linear.py`.
        shared_expert: classes of the two linears of megatron-core's shared expert.
        experts: makes the routed experts of a rank; signature of `GroupedExperts`.
        core_attention: makes a layer's softmax attention; signature of `causal_attention`.
        mix: convolution and delta rule of gated DeltaNet; signature of `convolve_and_scan`.
        mix_and_keep: the same for prompts; signature of `convolve_scan_and_keep`.
        mix_step: the same for one token of every row; signature of `convolve_and_step`.
        precision: (config, layer) -> context that the layer's forward pass runs in; with layer
            None, the context around the layers of the whole stage.
    """

    column: Callable[..., nn.Module]
    row: Callable[..., nn.Module]
    shared_expert: MLPSubmodules
    experts: Callable[..., nn.Module]
    core_attention: Callable[[], Callable[..., torch.Tensor]]
    mix: Callable[..., torch.Tensor]
    mix_and_keep: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    mix_step: Callable[..., torch.Tensor]
    precision: Callable[[TransformerConfig, int | None], AbstractContextManager]

"""Layers compiled by `torch.compile`, the same on every rank."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch._dynamo.config
from torch import nn


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compiles each layer in place; parameters and their names stay."""
    # megatron-core's linear warns on the first rank alone. A warning cuts a graph in two, and
    # ranks with other graphs could reduce their gradients in another order than the rest.
    torch._dynamo.config.reorderable_logging_functions.add(warnings.warn)
    for layer in layers:
        layer.compile()

"""Layers compiled by `torch.compile`, the same on every rank. Importing this takes seconds."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn


@torch.compiler.substitute_in_graph(warnings.warn, skip_signature_check=True)
def _silent(*args, **kwargs) -> None:
    """`warnings.warn` inside a graph, which it would cut in two. megatron-core's linear warns on
    the first rank alone, and ranks with other graphs could reduce their gradients in another order
    than the rest."""


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compiles each layer in place; parameters and their names stay."""
    for layer in layers:
        layer.compile()

"""Experts multiplied in one kernel, or one after the other, wherever they are."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_mm.engine.engine import Engine
from megatron_mm.model.layers.experts import GroupedExperts
from megatron_mm.model.layers.moe import MixtureOfExperts
from megatron_mm.model.layers.row_groups import InOneKernel, RowGroups


def multiply_by(model: torch.nn.Module, groups: Callable[..., RowGroups]) -> None:
    """Makes every layer of experts use these; arguments of `GroupedExperts.groups`."""
    found = [module for module in model.modules() if isinstance(module, GroupedExperts)]
    assert found
    for module in found:
        module.groups = groups


def in_one_kernel(engine: Engine) -> None:
    """Takes the grouped product, as a GPU does."""
    for chunk in engine.chunks:
        multiply_by(chunk, lambda sizes_E, rows_RH: InOneKernel(sizes_E, rows_RH.device))


def moe_layers(engine: Engine) -> list[MixtureOfExperts]:
    modules = (module for chunk in engine.chunks for module in chunk.modules())
    return [module for module in modules if isinstance(module, MixtureOfExperts)]


def dispatch(engine: Engine) -> None:
    """Sends every row through megatron-core's dispatcher, as ranks that share experts must."""
    for layer in moe_layers(engine):
        layer.alone = False

"""Number of parameters of a model, and of those that a token meets."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from megatron_mm.config import ModelConfig, hops
from megatron_mm.model.blueprint import blueprint


class Size(NamedTuple):
    total: int
    active: int  # without the routed experts that a token does not take in any hop


def model_size(model: ModelConfig) -> Size:
    experts, whole, idle, taken = model.language.num_experts, 0, 0, hops(model)
    for name, layout in blueprint(model).items():
        count = prod(layout.global_shape)
        whole += count
        if layout.expert:
            met = sum(taken[int(name.split("layers.")[1].split(".")[0])])
            idle += count // experts * max(0, experts - met)
    return Size(whole, whole - idle)

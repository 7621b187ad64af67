"""Number of parameters of a model, and of those that a token meets."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from megatron_mm.config import ModelConfig
from megatron_mm.model.blueprint import blueprint


class Size(NamedTuple):
    total: int
    active: int  # without the routed experts that a token does not take


def model_size(model: ModelConfig) -> Size:
    language, whole, routed = model.language, 0, 0
    for layout in blueprint(model).values():
        count = prod(layout.global_shape)
        whole += count
        routed += count if layout.expert else 0
    idle = routed // language.num_experts * (language.num_experts - language.moe_router_topk)
    return Size(whole, whole - idle)

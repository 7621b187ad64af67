"""A letter of one's own, `M`: a gated MLP in the place of the experts.

All that a new kind of layer needs stands here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mm.config import ModelConfig, RunConfig, parse_pattern
from megatron_mm.config.fields import PositiveInt
from megatron_mm.config.layers.counting import Counter
from megatron_mm.config.layers.kinds import LAYERS, LayerKind
from megatron_mm.config.rules import divides
from megatron_mm.model.families.rows import layer_row
from megatron_mm.model.layers.interface import BuildContext
from megatron_mm.parallel.param_layout import normal

PATTERN = "GM *E GE L J *M"


@dataclass
class MLPSettings:
    mlp_hidden_size: PositiveInt = 44
    """Width of the gated MLP between its linears."""


class GatedMLP(nn.Module):
    """(silu(x W_gate^T) * x W_up^T) W_down^T"""

    State = None

    def __init__(self, given: BuildContext):
        super().__init__()
        hidden, width = given.config.hidden_size, given.settings.mlp_hidden_size
        common = {"config": given.config, "tp": given.pg.tp}
        for name in ("linear_gate", "linear_up"):
            linear = given.backend.column(hidden, width, init=normal(given.std), **common)
            self.add_module(name, linear)
        self.linear_down = given.backend.row(width, hidden, init=normal(given.out_std), **common)

    @classmethod
    def build(cls, given: BuildContext) -> GatedMLP:
        return cls(given)

    def run(self, hidden_t1H: torch.Tensor, context: Any, state: None) -> torch.Tensor:
        gate, up = self.linear_gate(hidden_t1H)[0], self.linear_up(hidden_t1H)[0]
        return self.linear_down(F.silu(gate) * up)[0]


def mlp_width(run: RunConfig) -> int:
    return run.model.layer_settings("M").mlp_hidden_size


def mlp_flops(counter: Counter) -> bool:
    hidden, width = counter.run.model.language.hidden_size, mlp_width(counter.run)
    rows, given = counter.work.tokens, counter.normed()
    flows = [counter.linear("mlp", (hidden, width), rows, flows=given) for _ in ("gate", "up")]
    return counter.linear("mlp", (width, hidden), rows, flows=any(flows), adapter=True)


def mlp_check(run: RunConfig) -> None:
    tp = run.parallel.tensor_model_parallel_size
    divides("mlp_hidden_size", mlp_width(run), "tensor_model_parallel_size", tp)


# ---- its words and names in transformers, whose Qwen3-Next has such layers


def mlp_words(model: ModelConfig) -> dict[str, Any]:
    layers = parse_pattern(model.hybrid_layer_pattern)
    return {
        "mlp_only_layers": [layer.number for layer in layers if layer.kind == "M"],
        "intermediate_size": model.layer_settings("M").mlp_hidden_size,
    }


HF_ROWS = (
    layer_row("mlp.norm.weight", "post_attention_layernorm.weight"),
    *(
        layer_row(f"mlp.inner.linear_{name}.weight", f"mlp.{name}_proj.weight")
        for name in ("gate", "up", "down")
    ),
)
MLP = LayerKind(
    letter="M",
    title="gated MLP",
    role="ffn",
    key="mlp",
    module=f"{__name__}.GatedMLP",
    flops=mlp_flops,
    settings=MLPSettings,
    check=mlp_check,
    recompute="moe",
    lora=("linear_down",),
    hf_rows=f"{__name__}.HF_ROWS",
    hf_config=mlp_words,
    hf_keys=("mlp_only_layers", "intermediate_size"),
    hf_claims=lambda config, layer: layer in (config.get("mlp_only_layers") or ()),
    hf_settings=lambda config: {"mlp_hidden_size": config["intermediate_size"]},
)


def on_rank(function: Callable, *args):
    """Registers the letter as a plug-in would, once per process; ranks live on."""
    LAYERS.register("M", MLP)
    return function(*args)


def with_mlp(run: RunConfig, pattern: str = PATTERN, width: int = 40) -> RunConfig:
    """The run with this pattern, and a width that is not the default."""
    run.model = replace(run.model, hybrid_layer_pattern=pattern, layers={"M": MLPSettings(width)})
    return run

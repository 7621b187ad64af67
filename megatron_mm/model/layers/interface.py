"""The torch half of a kind of layer: how it is built, run and decoded.

`LayerKind.module` (config/layers/kinds.py) names a class that is a torch module and has the three
parts of `LayerModule`. The stack knows no other way to build or run a layer. Around a numbered
layer it puts a norm and the residual; a side that opens a pair gets the hidden state as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mm.config import ConfigError, Layer, RunConfig, effective_pattern, num_layers
from megatron_mm.config.layers.kinds import LayerKind
from megatron_mm.model.backends.interface import Backend
from megatron_mm.model.decode import LayerState
from megatron_mm.model.recompute import Recompute
from megatron_mm.plugins import import_object


@dataclass(frozen=True)
class BuildContext:
    """Everything that a layer is built from.

    Attributes:
        layer: its letter and its place in the pattern.
        recompute: parts of layers to compute again; `core_attn` is for the layer to obey.
    """

    run: RunConfig
    layer: Layer
    config: TransformerConfig
    pg: ProcessGroupCollection
    backend: Backend
    recompute: Recompute

    @property
    def settings(self) -> Any:
        """The settings of the layer's letter (`LayerKind.settings`)."""
        return self.run.model.layer_settings(self.layer.kind)

    @property
    def std(self) -> float:
        """Standard deviation of weights at the start."""
        return self.run.model.language.init_method_std

    @property
    def out_std(self) -> float:
        """The same of projections back to the residual stream, which start smaller the deeper the
        model (GPT-2's rule)."""
        return self.std / (2 * num_layers(effective_pattern(self.run.model))) ** 0.5


class Scheduled:
    """A module inside a layer with a number that changes over a run. The number is a parameter that
    never learns (`ParamLayout.set_by_run`), so that checkpoints, exports and rollouts have it."""

    def at_progress(self, done: float) -> None:
        """Sets the number for the step before which this share of the run's steps is done; called
        before and after every step of training."""
        raise NotImplementedError


class LayerModule(Protocol):
    """
    Attributes:
        State: the layer's memory of rows that are decoded; None if every position is computed by
            itself.
    """

    State: type[LayerState] | None

    @classmethod
    def build(cls, given: BuildContext) -> Self:
        """The layer, on one rank; every parameter described by `param_layout.place`."""
        ...

    def run(
        self,
        hidden_t1H: torch.Tensor,
        context: Any,
        state: Any,
        *given: Mapping[str, torch.Tensor] | torch.Tensor,
    ) -> torch.Tensor:
        """[t, 1, H] -> [t, 1, H]

        Args:
            context: a `StreamContext`, the same for all layers of the stage.
            state: the layer's `State` while rows are decoded, else None.
            given: the vision memories [m, 1, C] by name, for a kind that `reads_memory`; then the
                hidden state before the norm, [t, 1, H], for one that `reads_stream`.
        """
        ...


PARTS = ("build", "run", "State")


def torch_half(kind: LayerKind, instead: str | None = None) -> type[LayerModule]:
    """Imports the class that a kind names.

    Args:
        instead: dotted path of the class that a language family computes the letter with.

    Raises:
        ConfigError: if it cannot be imported or lacks a part of `LayerModule`, in one line.
    """
    path = instead or kind.module
    assert path is not None  # a side that closes a pair has no torch half
    found = import_object(path, f"layer {kind.letter} ({kind.title}):", kind="class")
    for part in PARTS:
        if not hasattr(found, part):
            raise ConfigError(
                f"layer {kind.letter} ({kind.title}): {path} has no `{part}`; it needs "
                f"{', '.join(PARTS)}"
            )
    return found

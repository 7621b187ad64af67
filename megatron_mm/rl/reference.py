"""The reference model: weights that wait in host memory and replace the model's for a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_mm.checkpoint import sharded
from megatron_mm.checkpoint.parameters import finish_param_gather
from megatron_mm.engine.engine import Engine


class HeldWeights:
    """Weights in host memory that can stand in the place of the engine's own for a while.

    Args:
        parameters: those of the engine's that differ.
        weights: for each of them, in the engine's layout.
    """

    def __init__(
        self,
        engine: Engine,
        parameters: Sequence[torch.nn.Parameter],
        weights: Sequence[torch.Tensor],
    ):
        self._engine, self._parameters, self._weights = engine, parameters, weights

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Lets the engine compute with these weights for a while. Every rank calls it."""
        finish_param_gather(self._engine)  # else a gather under way would overwrite them
        own = copied(self._parameters)
        _put(self._parameters, self._weights)
        try:
            yield
        finally:
            _put(self._parameters, own)


class Reference(HeldWeights):
    """The weights of a checkpoint. The engine keeps its own. Make it before an optimizer's state is
    loaded.

    Raises:
        CheckpointError: on every rank, for a checkpoint that does not fit.
    """

    def __init__(self, engine: Engine, folder: str):
        parameters = all_parameters(engine)
        weights = loaded(engine, lambda: sharded.load(engine, Path(folder), finetune=True))
        super().__init__(engine, parameters, weights)


def all_parameters(engine: Engine) -> list[torch.nn.Parameter]:
    """Returns every parameter that this rank holds, in a fixed order."""
    return [param for module in engine.modules for param in module.parameters()]


def copied(parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Returns copies in host memory."""
    return [param.detach().cpu().clone() for param in parameters]


def loaded(engine: Engine, load: Callable[[], object]) -> list[torch.Tensor]:
    """Returns copies of `all_parameters` as `load` leaves them, and puts the engine's own back,
    into its optimizer too: call it before an optimizer's state is loaded."""
    parameters = all_parameters(engine)
    own = copied(parameters)
    load()
    weights = copied(parameters)
    _put(parameters, own)
    engine.optimizer.reload_model_params()
    return weights


def _put(parameters: Sequence[torch.nn.Parameter], weights: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for param, weight in zip(parameters, weights, strict=True):
            param.copy_(weight)

"""The reference model: its weights wait in host memory and replace the model's for a pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch

from megatron_mm.checkpoint import sharded
from megatron_mm.checkpoint.parameters import finish_param_gather
from megatron_mm.engine.engine import Engine


class Reference:
    """The weights of a checkpoint, in the engine's layout. The engine keeps its own weights. Make
    it before an optimizer's state is loaded.

    Raises:
        CheckpointError: on every rank, for a checkpoint that does not fit.
    """

    def __init__(self, engine: Engine, folder: str):
        self._engine = engine
        own = self._copy()
        sharded.load(engine, Path(folder), finetune=True)
        self._weights = self._copy()
        self._put(own)
        engine.optimizer.reload_model_params()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Lets the engine compute with the reference's weights for a while. Every rank calls it."""
        finish_param_gather(self._engine)  # else a gather under way would overwrite them
        own = self._copy()
        self._put(self._weights)
        try:
            yield
        finally:
            self._put(own)

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        return chain.from_iterable(module.parameters() for module in self._engine.modules)

    def _copy(self) -> list[torch.Tensor]:
        return [param.detach().cpu().clone() for param in self._parameters()]

    def _put(self, weights: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for param, weight in zip(self._parameters(), weights, strict=True):
                param.copy_(weight)

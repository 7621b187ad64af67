"""Bytes that a rank holds between steps: parameters, gradients, optimizer state, as allocated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megatron_mm.engine.engine import Engine


@dataclass(frozen=True)
class State:
    """Bytes of whole allocations, padding included.

    Attributes:
        parameters: that the model computes with.
        gradients: DDP's buffers.
        optimizer: main parameters, moments and step counters.
    """

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def measured(engine: Engine) -> State:
    """The state of an engine that has done a step, on a real rank."""
    return _state(engine, [value for part in _parts(engine) for value in _moments(part)])


def planned(engine: Engine) -> State:
    """The state that an engine will have after a step: Adam keeps two moments of every parameter
    that it updates, in fp32, and torch's Adam a counter."""
    state = _state(engine, [])
    moments = 0
    for part in _parts(engine):
        for group in part.param_groups:
            moments += sum(2 * 4 * param.numel() + 4 for param in group["params"])
    return State(state.parameters, state.gradients, state.optimizer + moments)


def _state(engine: Engine, moments: list[torch.Tensor]) -> State:
    params = [param for module in engine.modules for param in module.parameters()]
    grads = [param.main_grad for param in params if hasattr(param, "main_grad")]
    mains = [p for part in _parts(engine) for group in part.param_groups for p in group["params"]]
    seen: set[int] = set()
    return State(_held(params, seen), _held(grads, seen), _held([*mains, *moments], seen))


def _parts(engine: Engine) -> list[torch.optim.Optimizer]:
    """torch's optimizers behind megatron-core's."""
    chained = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
    return [part.optimizer for part in chained if part.optimizer is not None]


def _moments(part: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    for state in part.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _held(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    """Bytes of the storages that are not in `seen` yet; they are then."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total

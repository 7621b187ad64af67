"""Named sets of weights in host memory that stand in the place of the engine's own for a while: a
reference model, teachers, a moving average."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from megatron_mm.checkpoint.parameters import finish_param_gather, parameters
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.weight_set import Weights, WeightSet

Put = Callable[[str], None]


class WeightSets:
    """The sets of one run, by name, on the layout of its engine."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._sets: dict[str, WeightSet] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._sets

    def add(self, name: str, weights: WeightSet, *, moves: bool = False) -> None:
        """Adds a set.

        Args:
            moves: whether `mix` will change it. It is then a part of the run's checkpoints; add it
                before the run's own is loaded.
        """
        self._sets[name] = weights
        if moves:
            self._engine.moving[name] = weights

    @contextmanager
    def swapping(self) -> Iterator[Put]:
        """Lets the engine compute with sets of weights for a while. Every rank calls it.

        Yields:
            a function that puts the named set in the place of the engine's weights, or of the set
            that it put there before. At the end the engine's own come back, bit by bit.
        """
        finish_param_gather(self._engine)  # else a gather under way would overwrite them
        held = {name: of.weights for name, of in self._sets.items()}  # some are made of its own
        own = copied(self._engine, set().union(*held.values()))

        def put(name: str) -> None:
            _put(self._engine, own | held[name])

        try:
            yield put
        finally:
            _put(self._engine, own)

    @torch.no_grad()
    def mix(self, name: str, alpha: float) -> None:
        """Moves a set: its weights become alpha times the engine's plus 1 - alpha times their own.
        Where both are equal they stay so to the bit. Every rank calls it.

        Args:
            alpha: above 0, up to 1.
        """
        finish_param_gather(self._engine)
        weights = self._sets[name].weights
        for key, param, layout in parameters(self._engine):
            if key in weights:
                mine = weights[key]
                theirs = param.detach().to(mine.device, mine.dtype)
                # What the run sets is a state; there is none between two.
                mine.lerp_(theirs, 1.0 if layout.set_by_run else alpha)


def copied(engine: Engine, names: set[str] | None = None) -> Weights:
    """Returns copies in host memory of the engine's weights, or of those in `names`."""
    return {
        name: param.detach().to("cpu", copy=True)
        for name, param, _ in parameters(engine)
        if names is None or name in names
    }


def loaded(engine: Engine, load: Callable[[], object]) -> Weights:
    """Returns copies of all weights as `load` leaves them, and puts the engine's own back, into its
    optimizer too: call it before an optimizer's state is loaded."""
    own = copied(engine)
    load()
    weights = copied(engine)
    _put(engine, own)
    engine.optimizer.reload_model_params()
    return weights


@torch.no_grad()
def _put(engine: Engine, weights: Mapping[str, torch.Tensor]) -> None:
    for name, param, _ in parameters(engine):
        if name in weights:
            param.copy_(weights[name])

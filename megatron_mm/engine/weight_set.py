"""One set of weights in host memory: a reference model, a teacher, a moving average."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Weights = dict[str, torch.Tensor]  # parameter's global name -> this rank's part of it


class WeightSet:
    """Weights of some of an engine's parameters, on its layout, in host memory. They are made when
    they are first needed, so that a set can be that of a start which is still to be loaded.

    Args:
        names: of the parameters that it has. It shares the others with the engine.
        make: returns copies of them, whose values are the set's own from then on.
        dtype: of the copies; None: each parameter's own.
    """

    def __init__(
        self,
        names: Sequence[str],
        make: Callable[[], Weights],
        dtype: torch.dtype | None = None,
    ):
        self.names, self.dtype = frozenset(names), dtype
        self._make = make
        self._weights: Weights | None = None

    @classmethod
    def of(cls, weights: Weights) -> WeightSet:
        """Returns a set of weights that are known."""
        return cls([*weights], lambda: weights)

    @property
    def weights(self) -> Weights:
        """The weights, one tensor for each of `names`."""
        if self._weights is None:
            self.fill(self._make())
        assert self._weights is not None  # `fill` has set it
        return self._weights

    def fill(self, weights: Weights) -> None:
        """Replaces the weights.

        Raises:
            ValueError: they are of other parameters than `names`.
        """
        if weights.keys() != self.names:
            raise ValueError(f"{len(weights)} tensors for the {len(self.names)} names of a set")
        dtype = self.dtype
        self._weights = weights if dtype is None else {n: t.to(dtype) for n, t in weights.items()}

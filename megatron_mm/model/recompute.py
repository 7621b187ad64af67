"""Activation recompute: keep a block's inputs only and run it again in the backward pass
(Chen et al. 2016, arXiv 1604.06174; selective: Korthikanti et al. 2022, arXiv 2205.05198).

torch's checkpoint without re-entrant autograd: a block may take and return any structure,
and gets gradients for its parameters whether or not its input needs any (a frozen embedding
before a trainable block). Nothing in the model is random, so no generator is restored. But a GPU
may add in another order when it repeats a pass, so choices are taken from the first (`Routing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from megatron_mm.config import TrainingConfig


@dataclass(frozen=True)
class Recompute:
    """Parts of the model that are computed again in the backward pass.

    Attributes:
        sublayers: run this many sub-layers of the language model as one block; None: none.
        core_attn, moe, vision: see `RecomputeModule` in config/settings.py.
    """

    sublayers: int | None = None
    core_attn: bool = False
    moe: bool = False
    vision: bool = False

    @property
    def routes(self) -> bool:
        """Whether layers of experts are run again."""
        return self.moe or self.sublayers is not None

    def repeats(self, module: str | None) -> bool:
        """Whether whole layers of this module (`LayerKind.recompute`) are asked for."""
        return module is not None and getattr(self, module)

    @classmethod
    def of(cls, training: TrainingConfig) -> Recompute:
        if training.recompute_granularity == "full":
            return cls(training.recompute_num_layers, vision=True)
        if training.recompute_granularity is None:
            return cls()
        return cls(**dict.fromkeys(training.recompute_modules, True))


class Pass(Protocol):
    """A value that tells a repeated pass from the first."""

    recomputing: bool


@contextmanager
def _repeating(context: Pass | None) -> Iterator[None]:
    if context is None:
        yield
        return
    context.recomputing = True
    try:
        yield
    finally:
        context.recomputing = False


def recomputed[T](function: Callable[..., T], *args, context: Pass | None = None) -> T:
    """function(*args), its inside computed again when gradients are asked for.

    Args:
        context: its `recomputing` is True during the repetition.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    # Stopping early would skip collectives that come after the last saved tensor; which one
    # that is may differ between ranks.
    with set_checkpoint_early_stop(False):
        return checkpoint(
            function,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), _repeating(context)),
        )


def core[T](again: bool, function: Callable[..., T], *args) -> T:
    """function(*args), recomputed if asked."""
    return recomputed(function, *args) if again else function(*args)

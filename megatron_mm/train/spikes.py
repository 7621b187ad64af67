"""A guard against steps whose loss is far above the usual: their update is held back."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

WINDOW = 32  # losses that make the usual one; a lasting rise is usual after half of them
ENOUGH = 8  # losses before the guard begins


class SpikeGuard:
    """Compares each loss with the median of those before it, held back or not.

    Args:
        factor: how many times the median a loss may be; 0: any.
        losses: the last ones before, of a run that goes on.
    """

    def __init__(self, factor: float, losses: Iterable[float] = ()):
        self.factor, self.losses = factor, deque(losses, maxlen=WINDOW)

    def objection(self, loss: float) -> str | None:
        """Takes in a loss, finite and the same on every rank. Returns why the update of its step is
        held back; None if it is not."""
        usual = statistics.median(self.losses) if len(self.losses) >= ENOUGH else None
        self.losses.append(loss)
        if not self.factor or usual is None or usual <= 0 or loss <= self.factor * usual:
            return None
        return (
            f"loss {loss:.4g} is {loss / usual:.3g} times {usual:.4g}, the median of the last "
            f"{min(WINDOW, len(self.losses) - 1)}; more than loss_spike_factor {self.factor:g} is "
            "held back"
        )

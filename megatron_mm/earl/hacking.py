"""Does the router reward pay for anything? A warning when it rises while accuracy falls."""

from __future__ import annotations

from collections import deque

WINDOW = 10  # rollouts in each of the two halves that are compared
MIN_CHANGE = 2.0  # in standard errors of the difference


class HackingWatch:
    """Compares the last rollouts with those before them."""

    def __init__(self, window: int = WINDOW):
        self._history: deque[tuple[float, float]] = deque(maxlen=2 * window)

    def update(self, hit_rate: float, accuracy: float) -> str | None:
        """One line for the user if hit rate rose and accuracy fell, both by more than their
        scatter explains; then the history begins anew.

        Args:
            hit_rate, accuracy: means of one rollout.
        """
        self._history.append((hit_rate, accuracy))
        if len(self._history) < self._history.maxlen:
            return None
        half = len(self._history) // 2
        history = [*self._history]
        hits = _change([h for h, _ in history[:half]], [h for h, _ in history[half:]])
        right = _change([a for _, a in history[:half]], [a for _, a in history[half:]])
        if hits[1] < MIN_CHANGE or right[1] > -MIN_CHANGE:
            return None
        self._history.clear()
        return (
            f"the hit rate rose by {hits[0]:.3f} while accuracy fell by {-right[0]:.3f} over the "
            f"last {half} rollouts: the router reward may be hacked; lower router_reward_weight "
            "or router_loss_coeff"
        )


def _change(before: list[float], after: list[float]) -> tuple[float, float]:
    """The difference of means, and the same in standard errors."""
    means = [sum(values) / len(values) for values in (before, after)]
    squares = sum(
        sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values)
        for values, mean in zip((before, after), means, strict=True)
    )
    difference = means[1] - means[0]
    return difference, difference / max(squares**0.5, 1e-9)

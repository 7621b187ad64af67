"""A watch on the router reward: it warns when the hit rate rises while the task's reward falls."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

WINDOW = 10  # rollouts in each of the two halves that are compared
MIN_CHANGE = 2.0  # in standard errors of the difference


class HackingWatch:
    """Compares the last rollouts with those before them."""

    def __init__(self, window: int = WINDOW):
        self._length = 2 * window
        self._history: deque[tuple[float, float]] = deque(maxlen=self._length)

    def observe(self, metrics: Mapping[str, float]) -> tuple[dict[str, float], str | None]:
        """Returns the watch's own metric, and the warning of `update`; neither where the rollout
        has no hit rate.

        Args:
            metrics: of one rollout.
        """
        hit_rate, task = (metrics.get(k) for k in ("rollout/moe/hit_rate", "reward/task"))
        if hit_rate is None or task is None:
            return {}, None
        warning = self.update(hit_rate, task)
        return {"rollout/moe/reward_hacking": float(warning is not None)}, warning

    def update(self, hit_rate: float, accuracy: float) -> str | None:
        """Returns one line for the user if the hit rate rose and accuracy fell, both by more than
        their scatter explains; then the history begins anew.

        Args:
            hit_rate, accuracy: means of one rollout.
        """
        self._history.append((hit_rate, accuracy))
        if len(self._history) < self._length:
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
    """Returns the difference of means, and the same in standard errors."""
    means = [sum(values) / len(values) for values in (before, after)]
    squares = sum(
        sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values)
        for values, mean in zip((before, after), means, strict=True)
    )
    difference = means[1] - means[0]
    return difference, difference / max(squares**0.5, 1e-9)

"""The guard against spikes, by hand."""

from __future__ import annotations

import pytest

from megatron_mm.train.spikes import ENOUGH, WINDOW, SpikeGuard


def held(factor: float, losses: list[float]) -> list[int]:
    guard = SpikeGuard(factor)
    return [n for n, loss in enumerate(losses) if guard.objection(loss) is not None]


@pytest.mark.parametrize(
    ("factor", "losses", "expected"),
    [
        (3.0, [1.0] * 20 + [3.1] + [1.0] * 5, [20]),
        (3.0, [1.0] * 20 + [3.0] + [1.0] * 5, []),  # more than, not as much as
        (0.0, [1.0] * 20 + [1e9], []),  # off
        (3.0, [1.0] * (ENOUGH - 1) + [9.0], []),  # too few to know
        (3.0, [1.0] * ENOUGH + [9.0], [ENOUGH]),
        (3.0, [1.0] * 20 + [9.0] * 3, [20, 21, 22]),  # spikes do not raise the usual at once
        (3.0, [8.0 / (1 + n) for n in range(40)], []),  # a loss that falls
        (3.0, [-1.0] * 20 + [5.0], []),  # of no sign that a factor has a meaning for
    ],
)
def test_which_steps_are_held_back(factor, losses, expected):
    assert held(factor, losses) == expected


def test_a_lasting_rise_becomes_the_usual():
    found = held(2.0, [1.0] * 100 + [5.0] * 100)
    assert found == [*range(100, 100 + WINDOW // 2)]


def test_it_says_why_and_goes_on_where_it_stopped():
    losses = [1.0, 2.0, 3.0] * 5
    whole = SpikeGuard(2.0, losses)
    again = SpikeGuard(2.0, [*whole.losses])
    for guard in (whole, again):
        text = guard.objection(10.0)
        assert text == (
            "loss 10 is 5 times 2, the median of the last 15; more than loss_spike_factor 2 is "
            "held back"
        )
    assert whole.losses == again.losses

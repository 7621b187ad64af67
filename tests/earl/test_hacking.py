"""The watch on the router reward."""

from __future__ import annotations

import pytest

from megatron_mm.earl.hacking import HackingWatch

STEADY, RISING = [0.5, 0.52] * 4, [0.3, 0.31] * 2 + [0.6, 0.61] * 2
FALLING = RISING[::-1]


@pytest.mark.parametrize(
    ("hits", "right", "warns"),
    [
        (RISING, FALLING, True),
        (RISING, RISING, False),
        (RISING, STEADY, False),
        (STEADY, FALLING, False),
        (FALLING, FALLING, False),
    ],
)
def test_it_warns_only_if_hits_rise_while_accuracy_falls(hits, right, warns):
    watch = HackingWatch(window=4)
    warnings = [watch.update(h, a) for h, a in zip(hits, right, strict=True)]
    assert warnings[:-1] == [None] * 7 and (warnings[-1] is not None) == warns
    if warns:
        assert "hit rate rose by 0.300 while accuracy fell by 0.300" in warnings[-1]
        assert watch.update(0.9, 0.1) is None  # the history began anew


def test_rollouts_without_a_hit_rate_are_not_watched():
    watch = HackingWatch(window=1)
    assert watch.observe({"reward/task": 0.5}) == ({}, None)
    found, warning = watch.observe({"rollout/moe/hit_rate": 0.5, "reward/task": 0.5})
    assert found == {"rollout/moe/reward_hacking": 0.0} and warning is None

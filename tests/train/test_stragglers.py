"""Slow ranks are named once, after two looks, and again when they have recovered."""

from __future__ import annotations

import logging
import socket
from unittest.mock import patch

import pytest
import torch

from megatron_mm.config import ParallelConfig
from megatron_mm.parallel import groups
from megatron_mm.train import stragglers
from megatron_mm.train.stragglers import EVERY, METRIC, Stragglers, slower


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ([1.0, 1.1, 0.9, 1.0], set()),
        ([1.0, 1.6, 1.0, 1.0], {1}),
        ([1.0, 1.6], {1}),
        ([1.6, 1.0], {0}),
        ([3.0, 1.0, 1.0, 2.0], {0, 3}),
        ([2.0, 2.0, 2.0, 1.0], set()),  # one that is faster makes the others no slower
    ],
)
def test_slow_against_most(seconds, slow):
    assert slower(seconds) == slow


class Kept(logging.Handler):
    """What is logged."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def on_rank_looks(times: list[float]) -> tuple[list[dict[str, float]], list[str]]:
    """Looks once for each of the times that rank 1 takes; rank 0 takes 1."""
    built = groups.build(ParallelConfig())
    kept, logger = Kept(), logging.getLogger(stragglers.__name__)
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    found, ours = Stragglers(built), times if built.world.rank() else [1.0] * len(times)
    try:
        with patch.object(stragglers, "_seconds", side_effect=ours):
            looks = [found.look(EVERY * (n + 1)) for n in range(len(times))]
            assert found.look(EVERY + 1) == {}  # between two looks nobody waits
    finally:
        logger.removeHandler(kept)
    return looks, kept.lines


def test_a_slow_rank_is_named_once_and_when_it_has_recovered(ranks):
    times = [1.0, 4.0, 1.0, 2.5, 3.0, 3.0, 1.0, 1.0]
    for looks, lines in ranks(2, on_rank_looks, times):
        assert [look[METRIC] for look in looks] == times
        name = f"rank 1 on {socket.gethostname()} is"
        assert len(lines) == 2  # a single slow look is nobody's fault
        assert lines[0].startswith(f"{name} slow: at step {5 * EVERY} it takes 3.0 times as long")
        assert lines[1] == f"{name} no longer slow"


def test_the_work_takes_time():
    assert 1e-6 < stragglers._seconds(torch.device("cpu")) < 10

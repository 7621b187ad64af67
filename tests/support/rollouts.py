"""Rollouts made by hand: two groups of two completions, without a model."""

from __future__ import annotations

import torch

from megatron_mm.data.sample import Sample
from megatron_mm.generation.lanes import Completion
from megatron_mm.rl.rollout.draw import Group
from megatron_mm.rl.rollout.score import Scored

LENGTHS = [3, 1, 2, 4]


def alone(values: torch.Tensor) -> torch.Tensor:
    """The sum over readers on one rank, and their values."""
    return values


def scored(rewards, spans=None, failed=None, numbers=(0, 1), **changes) -> Scored:
    """Returns a scored rollout whose completions have LENGTHS."""
    completions = [
        Completion(torch.arange(10, 10 + n), torch.full((n,), -1.0), True) for n in LENGTHS
    ]
    groups = tuple(
        Group(number, tuple(completions[2 * p : 2 * p + 2]), None)
        for p, number in enumerate(numbers)
    )
    rewards_PGC = torch.tensor(rewards).unsqueeze(2)
    values = dict(
        groups=groups,
        names=("exact",),
        rewards_PGC=rewards_PGC,
        failed_PGC=torch.tensor(failed).unsqueeze(2) if failed else rewards_PGC.isnan(),
        spans=spans or tuple(([], []) for _ in groups),
        rounds=1,
        generated=4,
        missing=0,
        skipped=(),
        failures=(),
        seconds={"generate": 1.0},
    )
    return Scored(**(values | changes))


def prompt() -> Sample:
    return Sample(torch.tensor([5, 6]), torch.tensor([6, 6]), torch.zeros(2), [], "rows:1")

"""Calls built-in rewards on tables of completions, as a worker does."""

from __future__ import annotations

from typing import Any

from megatron_mm.plugins import parse_specs
from megatron_mm.rl.rewards.functions import REWARDS, RewardFunction


def one(spec: str, completion: Any, truth: Any = None, ids=(1,), prompt: Any = "q", **columns):
    """Returns the reward of one completion."""
    function = RewardFunction(parse_specs([spec], REWARDS)[0])
    columns = {"ground_truth": [truth]} | {key: [value] for key, value in columns.items()}
    (reward,) = function([prompt], [completion], [list(ids)], columns, None, lambda *metric: None)
    return reward


def cases(table: list[tuple[Any, float, list[str]]]) -> list[tuple[Any, float, str]]:
    """Returns (truth, verdict, completion) of every completion of a table."""
    return [(truth, verdict, text) for truth, verdict, texts in table for text in texts]

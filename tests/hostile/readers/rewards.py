"""What reward functions return and raise."""

from __future__ import annotations

import math
from collections import deque
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from megatron_mm.rl.rewards.messages import MAX_REASON, Answer, Call, answer_of, body_of
from megatron_mm.rl.rewards.worker import scores_of
from tests.hostile.mutate import value

NAME = "rewards"
ALLOWED = (ValueError,)
COUNT = 3


class Odd:
    """A number that raises, names itself oddly, or is no number."""

    def __init__(self, kind: int) -> None:
        self.kind = kind

    def __float__(self) -> Any:
        if self.kind == 0:
            raise RuntimeError("no\x1b[2J\nerror: forged")
        return "3" if self.kind == 1 else math.nan

    def __len__(self) -> int:
        return -1 if self.kind == 2 else COUNT

    def tolist(self) -> Any:
        return {0: 1.0, 1: "abc", 2: b"abc"}[self.kind]


class Speechless(Exception):
    """An error without a text."""

    def __str__(self) -> str:
        return "a" * 10**5 + "\n\x1b[2J"


class Reward:
    """A function that returns or raises something, as the worker holds it."""

    built_in = False

    def __init__(self, result: Any) -> None:
        self.result = result

    def __call__(self, *_: Any) -> Any:
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


def make(rng: Random, folder: Path) -> Any:
    """Returns a list of rewards, or something in its place."""
    each = [value(rng, 1) for _ in range(rng.choice((0, 1, COUNT, COUNT, COUNT)))]
    odd = (Odd(rng.randrange(3)), Decimal("NaN"), Decimal("1e999"), Fraction(1, 3), 1j, print, b"1")
    if rng.random() < 0.4:
        each = [*each[:2], rng.choice(odd)]
    makers: tuple[Any, ...] = (
        list, tuple, deque, iter, lambda x: (y for y in x),
        lambda x: dict.fromkeys(map(str, x)), lambda x: {str(y) for y in x},
        lambda x: frozenset(map(str, x)), lambda x: "abc", lambda x: b"abc",
        lambda x: bytearray(b"abc"), lambda x: memoryview(b"abc"), lambda x: range(COUNT),
        lambda x: np.array([1.0, math.nan, math.inf]), lambda x: np.array(1.0),
        lambda x: np.array(each, dtype=object), lambda x: torch.ones(COUNT, 2),
        lambda x: torch.tensor([1.0] * COUNT, requires_grad=True), lambda x: Odd(rng.randrange(3)),
        lambda x: None, lambda x: math.nan, lambda x: Speechless(), lambda x: SystemExit(3),
        lambda x: KeyboardInterrupt(), lambda x: MemoryError(), lambda x: RecursionError(),
        lambda x: {"rewards": x}, lambda x: dict(enumerate(x)).items(), lambda x: map(float, x),
    )  # fmt: skip
    try:
        return Reward(rng.choice(makers)(each))
    except (ValueError, TypeError):  # numpy makes no array of these
        return Reward(each)


def read(value: Any) -> None:
    """Scores three completions and sends the answer over the pipe, as a worker does."""
    call = Call(1, 0, ["?"] * COUNT, ["3"] * COUNT, [[1]] * COUNT, {}, None)
    said = scores_of(value, call)
    answer = answer_of(body_of(call.number, said), call.number, COUNT)
    if isinstance(answer, Answer):
        assert len(answer.scores) == COUNT
        assert not isinstance(value.result, (dict, set, frozenset, str, bytes, bytearray))
        for score in answer.scores:
            assert score.value is None or math.isfinite(score.value)
            assert score.reason is None or len(score.reason) <= MAX_REASON
        return
    assert answer.reason and len(answer.reason) <= MAX_REASON
    assert answer.reason.isprintable()
    raise ValueError(answer.reason)

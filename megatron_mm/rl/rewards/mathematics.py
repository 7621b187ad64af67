"""The reward `math`: whether the answer equals the truth as mathematics, by math-verify.

It has a file of its own because math-verify imports sympy, which takes 2 s: a worker that serves
this reward imports it when it starts, not within the time limit of a call.
"""

from __future__ import annotations

import logging
from typing import Any

from math_verify import parse, verify

from megatron_mm.rl.rewards.text import Values, text_of


def math_equal(completions, ground_truth, **columns) -> Values:
    """Returns 1 if the completion's answer equals the truth (1/2, 0.5, \\frac12), else 0; None
    where the truth cannot be read as mathematics."""
    # math-verify warns at every call without a time limit of its own; the worker's is enough.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rewards: Values = []
    for completion, truth in zip(completions, ground_truth, strict=True):
        gold = [] if truth is None else _read(str(truth)) or _read(f"${truth}$")
        answer = _read(text_of(completion)) if gold else []
        rewards.append(float(verify(gold, answer, timeout_seconds=None)) if gold else None)
    return rewards


def _read(text: str) -> list[Any]:
    return parse(text, parsing_timeout=None)

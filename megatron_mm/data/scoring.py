"""How an answer is compared with the truth, and under which name it is reported."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from megatron_mm.data.errors import DataError


def score(scorer: str, prediction: str, ground_truth: str) -> float:
    """The share of `prediction` that is right, from 0 to 1.

    exact: all or nothing, outer whitespace ignored. per_word: position by position; missing
    and surplus words count as wrong. last_word: the final word alone (an answer after its
    steps). per_clause: as per_word, on the last word of each comma-separated clause.
    Raises DataError for an unknown scorer.
    """
    if scorer not in SCORERS:
        raise DataError(f"scorer {scorer!r} is unknown; use one of {', '.join(SCORERS)}")
    return SCORERS[scorer](prediction, ground_truth)


def result_key(row: Mapping[str, Any]) -> str:
    """The name a row's result is reported under: `skill`, or `skill/form` when the form is
    not the direct one."""
    skill, form = row.get("skill") or "all", row.get("form") or "direct"
    return skill if form == "direct" else f"{skill}/{form}"


def _exact(prediction: str, truth: str) -> float:
    return float(prediction.strip() == truth.strip())


def _per_word(prediction: str, truth: str) -> float:
    return _share(prediction.split(), truth.split())


def _last_word(prediction: str, truth: str) -> float:
    return float(_last(prediction) == _last(truth))


def _per_clause(prediction: str, truth: str) -> float:
    return _share([_last(clause) for clause in prediction.split(",")], truth.split())


def _last(text: str) -> str:
    # Punctuation around a word is no part of the answer, a sign or decimal point is.
    words = re.findall(r"-?\w+(?:[.\-]\w+)*", text)
    return words[-1] if words else ""


def _share(predicted: list[str], true: list[str]) -> float:
    if not true:
        return float(not predicted)
    right = sum(p == t for p, t in zip(predicted, true, strict=False))
    return right / max(len(predicted), len(true))


SCORERS: dict[str, Callable[[str, str], float]] = {
    "exact": _exact,
    "per_word": _per_word,
    "last_word": _last_word,
    "per_clause": _per_clause,
}

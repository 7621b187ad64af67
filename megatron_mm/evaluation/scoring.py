"""Scores answers against the truth, and names the results."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from megatron_mm.errors import DataError


def score(scorer: str, prediction: str, ground_truth: str) -> float:
    """Returns the share of `prediction` that is right, from 0 to 1.

    Args:
        scorer: "exact": all or nothing, outer whitespace ignored. "per_word": word by word;
            missing and surplus words are wrong. "last_word": only the last word (an answer after
            its steps). "per_clause": as per_word, on the last word of each comma-separated clause.

    Raises:
        DataError: the scorer is unknown.
    """
    if scorer not in SCORERS:
        raise DataError(f"scorer {scorer!r} is unknown; use one of {', '.join(SCORERS)}")
    return SCORERS[scorer](prediction, ground_truth)


def result_key(row: Mapping[str, Any]) -> str:
    """Returns the key under which a row's result is reported: `skill`, or `skill/form` unless the
    form is "direct".

    Raises:
        DataError: skill or form is not text.
    """
    skill, form = row.get("skill") or "all", row.get("form") or "direct"
    for name, value in (("skill", skill), ("form", form)):
        if not isinstance(value, str):
            raise DataError(f"{name} {value!r} is not text; write it in quotes")
    return skill if form == "direct" else f"{skill}/{form}"


def chance(answers: Iterable[tuple[str, str, str]]) -> dict[str, float]:
    """Returns for each result key the mean score of the best constant answer, chosen for each
    scorer of the key.

    Args:
        answers: (key, scorer, ground truth) of every question.
    """
    truths: dict[str, dict[str, list[str]]] = {}
    for key, scorer, truth in answers:
        truths.setdefault(key, {}).setdefault(scorer, []).append(truth)
    levels = {}
    for key, by_scorer in sorted(truths.items()):
        best = sum(_best_constant(s, found) * len(found) for s, found in by_scorer.items())
        levels[key] = best / sum(map(len, by_scorer.values()))
    return levels


def _best_constant(scorer: str, truths: list[str]) -> float:
    if scorer == "last_word":
        truths = [_last(truth) for truth in truths]
    candidates = [truth for truth, _ in Counter(truths).most_common(20)]
    # For answers scored word by word, the best constant is chosen word by word.
    columns = zip(*(truth.split() for truth in truths), strict=False)
    words = [Counter(column).most_common(1)[0][0] for column in columns]
    candidates.append((", " if scorer == "per_clause" else " ").join(words))
    return max(sum(score(scorer, c, t) for t in truths) / len(truths) for c in candidates)


def _exact(prediction: str, truth: str) -> float:
    return float(prediction.strip() == truth.strip())


def _per_word(prediction: str, truth: str) -> float:
    return _share(prediction.split(), truth.split())


def _last_word(prediction: str, truth: str) -> float:
    return float(_last(prediction) == _last(truth))


def _per_clause(prediction: str, truth: str) -> float:
    return _share([_last(clause) for clause in prediction.split(",")], truth.split())


def _last(text: str) -> str:
    # Punctuation around a word is not part of the answer; a sign or decimal point is.
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

"""Scores of the answers of runs, their differences, and intervals of these.

Runs are compared question by question. An interval over questions covers their choice: it is the
normal one of the mean over kinds of question of the mean over the kind's questions, whose values
are means over seeds. Questions of the same number are about one scene in all kinds, but where a
scene allows no such question, so they are one observation. An interval over seeds is Student's t of
the seeds' means.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np

FREE = "/free"  # the form of the questions that are reinforced
COVERED = 0.95  # of an interval

# key of a question's kind -> index of the question -> score
Scores = Mapping[str, Mapping[int, float]]
# key of a question's kind -> a value for each question, such as a difference of scores
Values = Mapping[str, np.ndarray]
Interval = tuple[float, float, float]  # mean, low, high


def read_scores(path: Path) -> Scores:
    """Reads the answers of a run, answers.jsonl."""
    scores: dict[str, dict[int, float]] = defaultdict(dict)
    for line in path.read_text().splitlines():
        record = json.loads(line)
        scores[record["key"]][record["index"]] = record["score"]
    return scores


def part(scores: Scores, trained: bool) -> Scores:
    """Returns only the questions in the reinforced form, or only the others. Runs without that form
    have been trained on all."""
    kinds = [key for key in scores if key.endswith(FREE)] or list(scores)
    return {key: found for key, found in scores.items() if (key in kinds) == trained}


def accuracy(scores: Scores) -> float | None:
    """Returns the mean over kinds of questions of their mean score; None without any."""
    if not scores:
        return None
    return float(np.mean([np.mean([*of_key.values()]) for of_key in scores.values()]))


def gaps(ours: Sequence[Scores], theirs: Sequence[Scores]) -> Values:
    """Returns the difference of each question, mean over the pairs of runs.

    Raises:
        SystemExit: they were asked different questions.
    """
    asked = [{(key, i) for key in s for i in s[key]} for s in (*ours, *theirs)]
    shared = set.intersection(*asked)
    total = len(set.union(*asked))
    if len(shared) < total:
        raise SystemExit(
            f"error: they were asked other questions: {len(shared)} of {total} are shared"
        )
    found = {}
    for key in sorted(ours[0]):
        order = sorted(ours[0][key])
        pairs = zip(ours, theirs, strict=True)
        found[key] = np.mean([[a[key][i] - b[key][i] for i in order] for a, b in pairs], 0)
    return found


def over_questions(values: Values, among: int = 1) -> Interval:
    """Returns the mean over kinds of the mean over questions, and its 95 % interval.

    Args:
        among: comparisons of which this one was picked, which widen it (Bonferroni).
    """
    means = [value.mean() for value in values.values()]
    if len({len(value) for value in values.values()}) == 1:
        groups = [np.mean([*values.values()], 0)]  # by scene
    else:
        groups = [value / len(means) for value in values.values()]
    # The variance of a sum of independent means; a kind of one question has no spread to tell.
    variance = sum(group.var(ddof=min(1, len(group) - 1)) / len(group) for group in groups)
    half = NormalDist().inv_cdf(1 - (1 - COVERED) / 2 / among) * np.sqrt(variance)
    return float(np.mean(means)), float(np.mean(means) - half), float(np.mean(means) + half)


def difference(ours: Sequence[Scores], theirs: Sequence[Scores]) -> Interval:
    """Returns the difference in accuracy and its 95 % interval over questions."""
    return over_questions(gaps(ours, theirs))


def paired[T](ours: Mapping[str, T], theirs: Mapping[str, T]) -> tuple[list[T], list[T]]:
    """Returns what both sides have of the seeds that both have, in the same order."""
    shared = sorted(ours.keys() & theirs.keys())
    return [ours[seed] for seed in shared], [theirs[seed] for seed in shared]


def gains(ours: Sequence[Scores], theirs: Sequence[Scores]) -> list[float]:
    """Returns the difference in accuracy of each pair of runs."""
    return [over_questions(gaps([a], [b]))[0] for a, b in zip(ours, theirs, strict=True)]


def over_seeds(values: Sequence[float]) -> Interval | None:
    """Returns the mean and its 95 % interval by Student's t; None below two seeds."""
    from scipy import stats  # slow to import

    if len(values) < 2:
        return None
    mean = float(np.mean(values))
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return mean, float(mean - half), float(mean + half)


def worst(values: Values) -> tuple[str, Interval]:
    """Returns the kind with the lowest mean, and that mean with its interval over questions, which
    counts that it was picked among all kinds."""
    key = min(values, key=lambda key: values[key].mean())
    return key, over_questions({key: values[key]}, len(values))


def mean(values: Iterable[float | None]) -> float | None:
    """Returns the mean of what is there."""
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def shown(gap: Interval) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*gap)

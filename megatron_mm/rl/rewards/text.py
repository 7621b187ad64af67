"""Rewards that read the completion as text.

Every reward has TRL's signature and returns one value for each completion. A completion is text, or
a conversation whose messages' contents are joined. A ground truth of None gives None: the reward
does not apply to that sample.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from megatron_mm.evaluation.scoring import score

Completion = str | list[dict[str, Any]]
Values = list[float | None]


def text_of(completion: Completion) -> str:
    """Returns the text of a completion, its messages joined by newlines."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message["content"]) for message in completion)


def each(
    completions: Sequence[Completion],
    ground_truth: Sequence[Any],
    compare: Callable[[str, Any], float],
) -> Values:
    """Returns `compare(text, truth)` of every completion whose truth is known, None of the
    others."""
    pairs = zip(completions, ground_truth, strict=True)
    return [None if truth is None else float(compare(text_of(c), truth)) for c, truth in pairs]


def exact(completions, ground_truth, ignore_case: bool = False, **columns) -> Values:
    """Returns 1 if the completion is the truth, outer whitespace aside, else 0."""

    def equal(text: str, truth: Any) -> bool:
        pair = text.strip(), str(truth).strip()
        return pair[0].casefold() == pair[1].casefold() if ignore_case else pair[0] == pair[1]

    return each(completions, ground_truth, equal)


def scorer(completions, ground_truth, scorer, **columns) -> Values:
    """Returns the share that is right, by the row's own `scorer` (evaluation/scoring.py)."""
    rows = zip(completions, ground_truth, scorer, strict=True)
    return [
        None if truth is None else score(name or "exact", text_of(c), str(truth))
        for c, truth, name in rows
    ]


def multiple_choice(completions, ground_truth, **columns) -> Values:
    """Returns 1 if the chosen letter is the truth's. The choice is, in this order: the last
    \\boxed{B}; the last "answer is B", "answer: (B)"; a letter that opens the text, "B", "(B)
    Paris", "B. Paris"; the last letter in brackets. Without any of them the reward is 0."""

    def equal(text: str, truth: Any) -> bool:
        return chosen_letter(text) == (chosen_letter(str(truth)) or str(truth).strip().upper())

    return each(completions, ground_truth, equal)


_CHOICES = (
    r"\\boxed\{\s*(?:\\text\{)?\(?([A-Z])\)?\}",
    r"(?i:answer|choice|option)(?i:\s+is)?\s*:?\s*\**\(?([A-Z])\b",
    r"^\s*\(?([A-Z])(?:\)|[.:](?:\s|$)|\s*$)",
    r"\(([A-Z])\)",
)


def chosen_letter(text: str) -> str | None:
    """Returns the letter that a text chooses, see `multiple_choice`; None if it chooses none."""
    for pattern in _CHOICES:
        found = re.findall(pattern, text)
        if found:
            return found[-1]
    return None


def anls(completions, ground_truth, threshold: float = 0.5, **columns) -> Values:
    """Returns the similarity by edit distance, for text read from images: 1 - NL where NL <
    threshold, else 0, with NL the edit distance over the longer length. The best of several truths
    counts; case and outer whitespace do not. ANLS, arXiv 1905.13648, eq. 1, for one question."""

    def similarity(text: str, truth: Any) -> float:
        truths = truth if isinstance(truth, (list, tuple)) else [truth]
        return max(_similarity(text, str(one), threshold) for one in truths)

    return each(completions, ground_truth, similarity)


def _similarity(text: str, truth: str, threshold: float) -> float:
    text, truth = text.strip().casefold(), truth.strip().casefold()
    longer = max(len(text), len(truth))
    if not longer:
        return 1.0
    # The difference in length is a lower bound of the distance, and takes no time.
    if abs(len(text) - len(truth)) / longer >= threshold:
        return 0.0
    distance = edit_distance(text, truth) / longer
    return 1 - distance if distance < threshold else 0.0


def edit_distance(one: str, other: str) -> int:
    """Returns the least number of insertions, deletions and replacements from one to the other
    (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        above, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


def tags(completions, tags: Sequence[str] = ("think", "answer"), **columns) -> Values:
    """Returns 1 if the completion is nothing but these tags, in order, each once:
    <think>...</think> <answer>...</answer>."""
    inner = r"\s*".join(rf"<{re.escape(tag)}>.*?</{re.escape(tag)}>" for tag in tags)
    whole = re.compile(rf"\s*{inner}\s*", re.DOTALL)
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    texts = [text_of(c) for c in completions]
    return [
        float(bool(whole.fullmatch(text)) and all(text.count(mark) == 1 for mark in marks))
        for text in texts
    ]


def pattern(completions, pattern: str, **columns) -> Values:
    """Returns 1 if the whole completion matches a regular expression, where . matches newlines
    too."""
    whole = re.compile(pattern, re.DOTALL)
    return [float(bool(whole.fullmatch(text_of(c)))) for c in completions]


def soft_overlong(
    completions, completion_ids, max_completion_length: int, soft_punish_cache: int, **columns
) -> Values:
    """Returns 0 up to `soft_punish_cache` tokens below the maximum, then less and less down to -1
    at the maximum and beyond. DAPO, arXiv 2503.14476, eq. 13."""
    return [
        soft_overlong_punishment(len(ids), max_completion_length, soft_punish_cache)
        for ids in completion_ids
    ]


def soft_overlong_punishment(length: int, max_length: int, cache: int) -> float:
    """Returns the reward of one completion of `length` tokens, -1 to 0."""
    if not 0 < cache <= max_length:
        raise ValueError(f"soft_punish_cache is {cache}; allowed: 1 to {max_length}")
    return float(max(-1.0, min(0.0, (max_length - cache - length) / cache)))

"""Rewards that read the completion as text.

Every reward has TRL's signature and returns one value for each completion. A completion is text, or
a conversation whose messages' contents are joined. A ground truth of None gives None: the reward
does not apply to that sample.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from megatron_mm.data.messages import IMAGE_MARK
from megatron_mm.evaluation.final_answer import after_thinking, marked
from megatron_mm.evaluation.scoring import score

Completion = str | list[dict[str, Any]]
Values = list[float | None]


def text_of(completion: Completion) -> str:
    """Returns the text of a completion, its messages joined by newlines. A content may be a list of
    parts, as Hugging Face's processors take it; one without text is a mark of an image."""
    if isinstance(completion, str):
        return completion
    return "\n".join(_content(message.get("content")) for message in completion)


def _content(content: Any) -> str:
    if content is None:  # a call of a tool alone
        return ""
    if isinstance(content, (list, tuple)):
        texts = (part.get("text") if isinstance(part, dict) else part for part in content)
        return "".join(IMAGE_MARK if text is None else str(text) for text in texts)
    return str(content)


def each(
    completions: Sequence[Completion],
    ground_truth: Sequence[Any],
    compare: Callable[[str, Any], float],
) -> Values:
    """Returns `compare(text, truth)` of every completion whose truth is known, None of the others.
    A list of truths are alternatives, of which the best counts.

    Raises:
        ValueError: a list of truths is empty.
    """
    rewards: Values = []
    for completion, truth in zip(completions, ground_truth, strict=True):
        text = text_of(completion)
        truths = truth if isinstance(truth, (list, tuple)) else [truth]
        if not truths:
            raise ValueError("ground_truth is an empty list; give at least 1 truth, or none")
        known = None if truth is None else max(float(compare(text, one)) for one in truths)
        rewards.append(known)
    return rewards


def answer_part(text: str) -> str:
    """Returns the content of the last <answer> or \\boxed{}, else the text after the thinking."""
    text = after_thinking(text)
    inner = marked(text)
    return text if inner is None else inner


def truth_text(truth: Any) -> str:
    """Returns a truth as text: a number as a person writes it (7, not 7.0), true and false as JSON
    does.

    Raises:
        ValueError: it is neither text nor number nor truth value.
    """
    if isinstance(truth, bool):
        return str(truth).lower()
    if isinstance(truth, float) and truth.is_integer():
        return str(int(truth))
    if isinstance(truth, (str, int, float)):
        return str(truth)
    raise ValueError(
        f"ground_truth is a {type(truth).__name__}; give a text, a number or a list of them"
    )


def exact(completions, ground_truth, *, ignore_case: bool = False, **columns) -> Values:
    """Returns 1 if the completion is the truth, or one of several truths, outer whitespace aside,
    else 0. Nothing is taken out of the completion: "<answer>7</answer>" is not 7. Equal characters
    that Unicode spells in two ways are equal; case counts, but for true and false as truth
    values."""

    def equal(text: str, truth: Any) -> bool:
        pair = [unicodedata.normalize("NFC", t).strip() for t in (text, truth_text(truth))]
        if ignore_case or isinstance(truth, bool):
            pair = [t.casefold() for t in pair]
        return pair[0] == pair[1]

    return each(completions, ground_truth, equal)


def scorer(completions, ground_truth, scorer, **columns) -> Values:
    """Returns the share that is right, by the row's own `scorer` (evaluation/scoring.py). The best
    of several truths counts."""
    rewards: Values = []
    for completion, truth, name in zip(completions, ground_truth, scorer, strict=True):

        def share(text: str, one: Any, name: str = name or "exact") -> float:
            return score(name, text, truth_text(one))

        rewards += each([completion], [truth], share)
    return rewards


def anls(completions, ground_truth, *, threshold: float = 0.5, **columns) -> Values:
    """Returns the similarity by edit distance, for text read from images: 1 - NL where NL <
    threshold, else 0, with NL the edit distance over the longer length. The best of several truths
    counts; case and outer whitespace do not. It is read in an <answer> or a \\boxed{} where there
    is one. ANLS, arXiv 1905.13648, eq. 1, for one question: a measure of reading, by which 2010 is
    nearly 2011."""

    def similarity(text: str, truth: Any) -> float:
        return _similarity(answer_part(text), truth_text(truth), threshold)

    return each(completions, ground_truth, similarity)


def _similarity(text: str, truth: str, threshold: float) -> float:
    text, truth = (unicodedata.normalize("NFC", t).strip().casefold() for t in (text, truth))
    longer = max(len(text), len(truth))
    if text == truth:
        return 1.0
    # The difference in length is a lower bound of the distance, and takes no time.
    if abs(len(text) - len(truth)) / longer >= threshold:
        return 0.0
    distance = edit_distance(text, truth, limit=int(threshold * longer) + 1) / longer
    return 1 - distance if distance < threshold else 0.0


def edit_distance(one: str, other: str, limit: int | None = None) -> int:
    """Returns the least number of insertions, deletions and replacements from one to the other
    (Levenshtein); with a limit, any number from there on where it is larger. With a limit it takes
    len(one) * limit steps."""
    reach = max(len(one), len(other)) if limit is None else limit
    far = len(one) + len(other)
    row = [j if j <= reach else far for j in range(len(other) + 1)]
    for i, a in enumerate(one, start=1):
        low, high = max(1, i - reach), min(len(other), i + reach)
        above, row[low - 1] = row[low - 1], i if low == 1 else far
        for j in range(low, high + 1):
            step = min(row[j] + 1, row[j - 1] + 1, above + (a != other[j - 1]))
            above, row[j] = row[j], step
        if limit is not None and min(row[low - 1 : high + 1]) >= limit:
            return limit
    return row[-1]


def tags(completions, *, tags: Sequence[str] = ("think", "answer"), **columns) -> Values:
    """Returns 1 if the completion is nothing but these tags, in order, each once and none of them
    blank: <think>...</think> <answer>...</answer>.

    Raises:
        ValueError: `tags` is not a list of names.
    """
    if isinstance(tags, str) or not tags:
        raise ValueError(f"tags is {tags!r}; give a list of names, such as ['think', 'answer']")
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    return [float(_is_tagged(text_of(c).strip(), marks)) for c in completions]


def _is_tagged(text: str, marks: Sequence[str]) -> bool:
    if any(text.count(mark) != 1 for mark in marks):
        return False
    # In order, with text inside each tag and whitespace alone between them.
    end = 0
    for place, mark in enumerate(marks):
        start = text.find(mark, end)
        if start < 0 or bool(text[end:start].strip()) != (place % 2 == 1):
            return False
        end = start + len(mark)
    return end == len(text)


def pattern(completions, *, pattern: str, **columns) -> Values:
    """Returns 1 if the whole completion matches a regular expression, where . matches newlines
    too."""
    whole = re.compile(pattern, re.DOTALL)
    return [float(bool(whole.fullmatch(text_of(c)))) for c in completions]


def soft_overlong(
    completions, completion_ids, *, max_completion_length: int, soft_punish_cache: int, **columns
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

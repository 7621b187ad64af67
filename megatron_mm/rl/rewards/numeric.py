"""Finds the value of a completion's final answer; and the reward `numeric`."""

from __future__ import annotations

import math
import re
from typing import Any

from megatron_mm.evaluation.final_answer import final_answer, plain
from megatron_mm.rl.rewards.numbers import (
    LEAD,
    NUMBER,
    NUMBER_WORDS,
    Value,
    close,
    in_words,
    parse_value,
    value_of,
)
from megatron_mm.rl.rewards.text import Values, each

_BEFORE = re.compile(r"(?:[\w\\]|\d[.,:/^]|[.:/^-])\Z")  # $ would match before a line break, too
_AFTER = re.compile(r"[-.,:/^*]?\d|[A-Za-z_\\^{(]|%")
_NAME = re.compile(r"\s*\\?[A-Za-z]\w{0,12}(?:\([A-Za-z]\))?\s*")
_NEXT = re.compile(
    r"\s*(?:,?\s*(?:or|and|to|nor)\b|[/,;&\u00b1-]|\+/-|\\pm\b|\\(?:or|text)\b)\s*"
    r"(?:even\s|maybe\s|perhaps\s)?[-+$(]?\s*(?:\d|(?:" + "|".join(NUMBER_WORDS) + r")\b)",
    re.IGNORECASE,
)
_SIGN_AFTER = re.compile(r"\s*[-+*\u00d7/^\u00b7]\s*\(?\d")
_DENIED = re.compile(
    r"(?:\b(?:not|never|than|least|most|over|under|above|below|between|nor|neither|either|"
    r"(?:one|out|any|each|half)\s+of)|n't)\s+"
    r"(?:be\s+|equal\s+to\s+|exactly\s+)?[$(]?$",
    re.IGNORECASE,
)
_LISTED = re.compile(
    r"\d\s?[%A-Za-z\u00b0]{0,12}\s?(?:,?\s?\b(?:or|and|to|through)|[;/&]|-)\s?[$(]?$", re.IGNORECASE
)
_COMMAS = re.compile(r"(?:^|\n)[^A-Za-z=\n]*\d\s?,\s?$|\d\s?,\s?-?[\d.]+\s?,\s?$")
_SAID = re.compile(r"[A-Za-z=:]")
_OPERATED = re.compile(r"[\d)]\s?[-+*/\u00d7\u00b7^]\s?\(?$")
# What a number at the end of a sentence is not: a part of a formula, a bound, an exception.
_OF_OTHERS = re.compile(
    r"(?:[\w)}\]][ \t]*[-+*/\u00d7\u00b7^]|[<>\u2264\u2265\u2260\u221a|]|[A-Za-z\])][({]"
    r"|\b(?:but|except|excluding|without|if|when|unless|until|sqrt|root|log|ln|sin|cos|tan))"
    r"[ \t]*[({]?\Z",
    re.IGNORECASE,
)


def leading_value(text: str) -> Value | None:
    """Returns the value that a claim begins with ("7, because 3 + 4 = 7"); None if there is none,
    or if another follows it at once ("7 or 8", "5 to 7", "3 + 4")."""
    text = plain(text[:1000])
    sentence = re.split(r"[.!?;](?=\s|$)|,\s(?=[a-z])|\b(?:because|since|as|which)\b", text)[0]
    whole = parse_value(sentence)
    if whole is not None:
        return whole
    if "=" in sentence:
        sentence = sentence.rpartition("=")[2]
    start = LEAD.match(sentence).end()  # type: ignore[union-attr]
    if name := _NAME.match(sentence, start):
        is_word = sentence[name.end() : name.end() + 1] in "=\u2248"
        start = name.end() + 1 if is_word and name.end() < len(sentence) else start
    rest = re.sub(r"^\s*([-+])\s+(?=[\d.$])", r"\1", sentence[start:]).lstrip(" (")
    found = NUMBER.match(rest)
    if found is None:
        word = re.match(r"[A-Za-z-]+", rest)
        more = word and (_NEXT.match(rest, word.end()) or re.match(r"\s+of\b", rest[word.end() :]))
        return in_words(word[0]) if word and not more else None
    after = rest[found.end() :]
    if _AFTER.match(after) or _NEXT.match(after) or _SIGN_AFTER.match(after):
        return None
    return value_of(found)


def last_value(text: str) -> Value | None:
    """Returns the last number of a text; None if there is none, or if that number is denied ("not
    7"), one of several ("7 or 8"), a part of something longer (10:30, 3.1.4) or an operand."""
    text = plain(text)
    digit = max((m.end() for m in re.finditer(r"\d", text)), default=0)
    if not digit:
        return None
    start = max(0, digit - 400)  # a value is shorter
    line = text[start:]
    last = None
    for found in NUMBER.finditer(line):
        last = found
    if last is None or any(c.isdigit() for c in line[last.end() :]):
        return None
    before, after = line[: last.start()], line[last.end() :]
    if _BEFORE.search(before[-2:]) and not re.search(r"(?<!\d)[:.]\Z|\s-\Z", before[-2:]):
        return None
    if after[:1] and _AFTER.match(after) and after[0] != "(":
        return None
    if any(c.isdigit() for c in text[: start + last.start()]) and not _SAID.search(
        text, 0, start + last.start()
    ):
        return None  # nothing but numbers
    checks = (_DENIED, _LISTED, _COMMAS, _OPERATED)
    if last["sign"] and re.search(r"[\d)][ \t]\Z", before):
        return None  # an operand: 5 -3
    return None if any(check.search(before[-80:]) for check in checks) else value_of(last)


def told_value(claim: str) -> Value | None:
    """Returns the value of a claim that is a sentence ("the sum of 3 and 4, which is 7"): its last
    number, by the rules of `last_value`; None if it is a part of a formula ("x + 2") or excepted
    ("anything but 2")."""
    text = plain(claim)
    numbers = [*NUMBER.finditer(text)]
    if not numbers or _OF_OTHERS.search(text[: numbers[-1].start()]):
        return None
    return last_value(claim)


def answered_value(text: str) -> Value | None:
    """Returns the value of a completion's final answer (`final_answer`): the whole content of a
    mark, the beginning of a claim, else the last number of the text."""
    final = final_answer(text)
    if final.kind == "marked":
        return parse_value(final.text)
    if final.kind == "claimed":
        corrected = (leading_value(text) for text in final.corrections)
        found = next((v for v in corrected if v is not None), leading_value(final.text))
        return told_value(final.text) if found is None else found
    whole = parse_value(final.text) if len(final.text) < 200 else None
    return whole if whole is not None else last_value(final.text)


def numeric(
    completions,
    ground_truth,
    *,
    tolerance: float = 1e-6,
    relative_tolerance: float = 0.0,
    **columns,
) -> Values:
    """Returns 1 if the value of the completion's final answer is within tolerance +
    relative_tolerance * |truth| of the truth, else 0.

    Truth and answer are read by one grammar (see the module). 7% is 0.07 and not 7. A unit counts
    where both have a known one: 70 cm is 0.7 m, 7 m is not 7 kg. Without a mark or a claim the last
    number of the text is its answer, and that of a claim that begins with none. "7 or 8", "about 5
    to 7", "1, 2, 3" and "3 + 4" are no answer.

    Raises:
        ValueError: the truth is not a number as a whole.
    """

    def near(text: str, truth: Any) -> bool:
        true = _truth(truth)
        found = answered_value(text)
        return found is not None and close(found, true, tolerance, relative_tolerance)

    return each(completions, ground_truth, near)


def _truth(truth: Any) -> Value:
    number = isinstance(truth, (int, float)) and not isinstance(truth, bool)
    value = Value(float(truth)) if number else None
    if isinstance(truth, str):
        value = parse_value(truth)
    if value is None or not math.isfinite(value.amount):
        raise ValueError(
            f"ground_truth {truth!r} holds no number: write one number, such as 3.5, 1,234, 1/2, "
            "3e2 or 7%"
        )
    return value

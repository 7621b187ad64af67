"""The reward `math`: whether the answer equals the truth as mathematics, by math-verify.

It has a file of its own because math-verify imports sympy, which takes 2 s: a worker that serves
this reward imports it when it starts, not within the time limit of a call.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from math_verify import parse, verify

from megatron_mm.evaluation.final_answer import final_answer, normal_text, plain
from megatron_mm.rl.rewards.numbers import close, parse_value
from megatron_mm.rl.rewards.numeric import answered_value, leading_value, told_value
from megatron_mm.rl.rewards.text import Values, each, truth_text

MAX_ANSWER = 1000  # characters; a longer one is no answer
_FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_WORD = re.compile(r"(?<!\\)\b(?!(?:sin|cos|tan|log|ln|exp|sqrt|pi|frac|inf)\b)[A-Za-z]{2,}")
# A truth of words, or of one letter in brackets.
_WORDS = re.compile(r"\W*[A-Za-z]\W*|[^\d=<>+^/\\]*[A-Za-z]{2}[^\d=<>+^/\\]*")
_NAME = re.compile(r"\s*\\?[A-Za-z]\w{0,8}(?:_\{?\w\}?)?(?:\(\w\))?\s*")
_END = re.compile(r"[.;](?=\s|$)|,\s*(?:and|so|since|because|which|not)\b|\bbecause\b|\bsince\b|\n")
_EQUALS = re.compile(r"(?<![<>!=\\])=(?!=)")


def math_equal(completions, ground_truth, **columns) -> Values:
    """Returns 1 if the completion's final answer (`final_answer`) equals the truth (1/2, 0.5,
    \\frac12), else 0; None where the truth is empty.

    Numbers are read as `numeric` reads them and compared to 6 decimals: 7% is 0.07 and not 7, units
    differ. Other answers are compared by math-verify, words as text. A side of an equation counts
    as the answer where the other is a name (x = 7); sides that are not equal to each other (8 = 7)
    are no answer, and neither are several answers to a truth of one (7 or 8; 1, 2). Without a mark
    or a claim the answer is the last formula of the text, else the whole of it, else its last
    number.
    """
    # math-verify warns at every call without a time limit of its own; the worker's is enough.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    truths = [None if truth == "" else truth for truth in ground_truth]
    return each(completions, truths, lambda text, truth: _equal(text, truth_text(truth)))


def _equal(text: str, truth: str) -> bool:
    return any(_same(answer, truth) for answer in _answers(text, truth))


def _answers(text: str, truth: str) -> list[str]:
    """Returns how a completion's answer may be meant; mostly one text."""
    final = final_answer(text)
    if final.kind == "marked":
        return [final.text]
    if final.kind == "claimed":
        corrected = [t for t in final.corrections if leading_value(t) is not None]
        if corrected:
            return [_formula(corrected[0]) or _END.split(corrected[0])[0]]
        formula = _formula(final.text)
        answer = formula or _END.split(final.text)[0]
        meant = [answer, answer.rstrip("! ")] if answer.rstrip().endswith("!") else [answer]
        sentence = formula is None and len(_WORD.findall(plain(answer))) > 1
        told = told_value(final.text) if sentence else None
        return meant if told is None or parse_value(answer) else [*meant, repr(told.amount)]
    whole = final.text.strip()
    if len(whole) < 200 and "\n" not in whole and normal_text(whole) == normal_text(truth):
        return [whole]
    formulas = [*_FORMULA.finditer(whole[-2 * MAX_ANSWER :])]
    if formulas:
        return [next(part for part in formulas[-1].groups() if part is not None)]
    if len(whole) < 200 and "\n" not in whole and not re.search(r"[A-Za-z]{2,} ", plain(whole)):
        return [whole]
    value = answered_value(whole)
    return [] if value is None else [repr(value.amount)]


def _formula(claim: str) -> str | None:
    """Returns the formula that a claim begins with, if no other follows it ("$7$ or $8$")."""
    found = _FORMULA.match(claim[:MAX_ANSWER])
    if found is None:
        return None
    rest = claim[found.end() :]
    if re.match(r"\s*(?:,?\s*(?:or|and)\b|[,/&])\s*[$\\]", rest):
        return None
    unit = re.match(r"\s*(?:%|\\%|percent)", rest)
    inner = next(part for part in found.groups() if part is not None)
    return inner + (unit[0] if unit else "")


def _same(answer: str, truth: str) -> bool:
    if not answer.strip() or len(answer) > MAX_ANSWER:
        return False
    spelled = normal_text if _WORDS.fullmatch(plain(truth)) else _squeezed
    if spelled(answer) == spelled(truth):
        return True
    true = parse_value(truth)
    if true is not None:
        found = parse_value(answer)
        if found is not None:
            return close(found, true, 1e-6, 1e-6)
    one, other = plain(answer), plain(truth)
    if true is None and _WORD.search(re.sub(r"\\[A-Za-z]+", " ", other)):
        return False  # words, which were compared as text
    if re.search(r"\bor\b|\bnot\b|%", one) or "%" in other:
        return False
    if "," in one and "," not in other:
        return False  # several answers
    sides = [side.strip() for side in _EQUALS.split(_undressed(answer))]
    if len(sides) > 1 and not _EQUALS.search(truth):
        named = [side for side in sides if not _NAME.fullmatch(side)]
        return bool(named) and all(_verified(side, _undressed(truth)) for side in named)
    return _verified(_undressed(answer), _undressed(truth))


def _squeezed(text: str) -> str:
    return "".join(plain(text).split()).rstrip(".,;")


def _undressed(text: str) -> str:
    """Returns a formula without the signs around it."""
    text = re.sub(r"\$|\\[()\[\]](?![A-Za-z])", " ", text).strip()
    return re.sub(r"^\*\*|\*\*$", "", text).rstrip(".").strip()


def _verified(answer: str, truth: str) -> bool:
    if _SUBSCRIPT.search(answer) and not _SUBSCRIPT.search(truth):
        return False
    gold, found = _read(truth), _read(answer)
    return bool(gold) and bool(found) and bool(verify(gold, found, timeout_seconds=None))


_SUBSCRIPT = re.compile(r"\d\s*_\s*\{?\d")  # the base of a number, which math-verify leaves out


def _read(text: str) -> list[Any]:
    # Only the formula itself: "7" would be found in any text that holds it.
    return parse(f"${text}$", parsing_timeout=None)

"""Scores answers against the truth, and names the results."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from megatron_mm.data.place_names import without_places
from megatron_mm.errors import DataError
from megatron_mm.evaluation.final_answer import after_thinking, marked, plain


def score(scorer: str, prediction: str, ground_truth: str) -> float:
    """Returns the share of `prediction` that is right, from 0 to 1.

    Args:
        scorer: "exact": all or nothing, outer whitespace ignored. "per_word": word by word;
            missing and surplus words are wrong. "last_word": only the last word (an answer after
            its steps); "not 7" and "7 or 8" are no answer. "per_clause": as per_word, on the last
            word of each comma-separated clause. All but "exact" look only into the last \\boxed{}
            or <answer>, where there is one. What stands before </think> is no part of an answer,
            nor are the words that say where it looks.

    Raises:
        DataError: the scorer is unknown, fails, or returns no number from 0 to 1.
    """
    if scorer not in SCORERS:
        raise DataError(f"scorer {scorer!r} is unknown; use one of {', '.join(SCORERS)}")
    try:
        value = float(SCORERS[scorer](without_places(prediction), without_places(ground_truth)))
    except Exception as error:  # a scorer of the user's may raise anything
        reason = " ".join(str(error).split())
        raise DataError(f"scorer {scorer!r} failed: {type(error).__name__}: {reason}") from None
    if not 0 <= value <= 1:
        raise DataError(f"scorer {scorer!r} returned {value}; allowed: 0 to 1")
    return value


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
        truths = [_last(truth) or truth.strip() for truth in truths]
    candidates = [truth for truth, _ in Counter(truths).most_common(20)]
    # For answers scored word by word, the best constant is chosen word by word.
    columns = zip(*(truth.split() for truth in truths), strict=False)
    words = [Counter(column).most_common(1)[0][0] for column in columns]
    candidates.append((", " if scorer == "per_clause" else " ").join(words))
    return max(sum(score(scorer, c, t) for t in truths) / len(truths) for c in candidates)


def _exact(prediction: str, truth: str) -> float:
    said = (prediction, after_thinking(prediction))
    return float(_composed(truth) in map(_composed, said))


def _per_word(prediction: str, truth: str) -> float:
    return _share(_answer(prediction).split(), _composed(truth).split())


def _last_word(prediction: str, truth: str) -> float:
    prediction, truth = _answer(prediction), _composed(truth)
    if not (word := _last(truth)):
        # A sign such as + has no word: it has to be the last one, quotes and full stop aside.
        sign, said = ((text.split() or [""])[-1] for text in (truth, prediction))
        return float(sign in (said, said.strip(".,()\"'`")))
    if prediction == truth:
        return 1.0
    return float((_last(prediction), _hedged(prediction)) == (word, _hedged(truth)))


def _per_clause(prediction: str, truth: str) -> float:
    words = [_last(word) or word for word in _composed(truth).split()]
    signs = not all(map(_last, words))
    # A comma inside a number cuts nothing where the truth writes its numbers so.
    comma = _CLAUSE if any("," in word for word in words) else ","

    def said(clause: str) -> str:
        last = (clause.split() or [""])[-1]
        if _hedged(clause):
            return ""
        return last if signs and not _last(last) else _last(clause)

    return _share([said(clause) for clause in re.split(comma, _answer(prediction))], words)


_CLAUSE = r",(?!\d{3}(?!\d))|(?<!\d),"
# Punctuation around a word is not part of the answer; a sign, a decimal point, a percent sign and
# what joins the parts of a fraction, a time or a name are.
_WORD = re.compile(
    r"-?(?:(?<![\w.])\.(?=\d))?\w+"
    r"(?:(?:[.\-/]|(?<=\d)(?:,(?=\d{3}(?!\d))|:(?=\d))|(?<=[^\W\d])['\u2019](?=[^\W\d]))\w+)*"
    r"(?:\+\+|#|[ ]?%)?"
)
_HEDGE = re.compile(r"(?:\b(?:not|never|or|nor)|n['\u2019]t)[\s\"'(\[*]*$", re.IGNORECASE)


def _answer(prediction: str) -> str:
    """Returns the content of the last \\boxed{} or <answer>, else the text after the thinking."""
    text = after_thinking(prediction)
    inner = marked(text)
    return _composed(text) if inner is None else _composed(plain(inner))


def _composed(text: str) -> str:
    # One character may be spelled in two ways; both minus signs are one.
    return unicodedata.normalize("NFC", text).replace("\u2212", "-").strip()


def _last(text: str) -> str:
    words = _WORD.findall(text)
    return words[-1].replace(" ", "") if words else ""


def _hedged(text: str) -> bool:
    """Whether the last word is denied ("not 7") or one of several ("7 or 8")."""
    starts = [found.start() for found in _WORD.finditer(text)]
    return bool(starts) and bool(_HEDGE.search(text[max(0, starts[-1] - 20) : starts[-1]]))


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

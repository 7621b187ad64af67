"""Labelled spans: the tokens of a completion that exercise a skill, and whether they are right.

A *labeller* reads a row and the text of a completion and names parts of the text. It is a name
(`clauses`, `whole`) or the dotted path of a function

    def my_labeller(row, text, where) -> list[Label]

that finds the parts in whatever way its data allows. `token_labels` turns them into spans of
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from megatron_mm.data.chat import answer_text
from megatron_mm.data.messages import check_messages
from megatron_mm.data.place_names import without_places
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.errors import DataError, RLError
from megatron_mm.evaluation.scoring import score
from megatron_mm.plugins import Registry, parse_specs

# (first token, end, skill id or -1, right or not), in tokens of a completion
Span = tuple[int, int, int, bool]
Row = Mapping[str, Any]
BETWEEN = ", "  # clauses


class Label(NamedTuple):
    """A labelled part: characters [start, stop) of a text, or tokens of a completion."""

    start: int
    stop: int
    skill: str
    correct: bool


Labeller = Callable[[Row, str, str], list[Label]]


LABELLERS: Registry[Labeller] = Registry(
    "labeller",
    {name: f"megatron_mm.earl.spans.{name}" for name in ("clauses", "whole")},
    kind="function",
    error=RLError,
)


def load_labeller(entry: str) -> Labeller:
    """Returns the labeller of a name or dotted path, with options such as `mine(skill='ocr')`.

    Raises:
        RLError: for a labeller that cannot be found or imported.
    """
    (spec,) = parse_specs([entry], LABELLERS)
    return partial(LABELLERS[spec.path], **spec.options)


def clauses(row: Row, text: str, where: str) -> list[Label]:
    """Cuts the text at ", ". Clause i has the skill of the row's span i, and is right if it is that
    span's text; clauses beyond the spans have no skill. A span whose own text holds ", " is
    compared with as many clauses together. A text of one word is the direct answer, if the last
    span has a `value`: it is right if it is that value, and exercises the row's skill where that is
    one of its spans', else the last span's."""
    spans = _spans(row, where)
    if spans and spans[-1].get("value") is not None and len(text.split()) == 1:
        right = without_places(text).strip() == without_places(spans[-1]["value"])
        own = row.get("skill") in {span["skill"] for span in spans}
        return [Label(0, len(text), row["skill"] if own else spans[-1]["skill"], right)]
    labels, start = [], 0
    for span in spans:
        if start > len(text):
            break  # the completion has fewer clauses than the row spans
        stop = start - len(BETWEEN)
        for _ in range(1 + span["text"].count(BETWEEN)):
            found = text.find(BETWEEN, stop + len(BETWEEN))
            stop = len(text) if found < 0 else found
            if found < 0:
                break
        if start < stop:
            right = without_places(text[start:stop]) == without_places(span["text"])
            labels.append(Label(start, stop, span["skill"], right))
        start = stop + len(BETWEEN)
    return labels


def whole(row: Row, text: str, where: str) -> list[Label]:
    """Labels the whole text with the row's `skill`; it is right if the row's scorer gives it 1.
    Rows without a skill or a truth have no label."""
    skill, truth, scorer = row.get("skill"), row.get("ground_truth"), row.get("scorer") or "exact"
    if skill is None or truth is None or not text:
        return []
    for name, value in (("skill", skill), ("ground_truth", truth), ("scorer", scorer)):
        if not isinstance(value, str):
            raise DataError(f"{where}: {name} {value!r} is not text; write it in quotes")
    _check_skill(skill, where)
    try:
        return [Label(0, len(text), skill, score(scorer, text, truth) == 1)]
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def token_labels(
    row: Row, ids: Sequence[int], tokenizer: Tokenizer, labeller: Labeller, where: str
) -> list[Label]:
    """Returns the labels of a completion in tokens, ascending and without overlap. A token that
    parts share belongs to the one that holds most of it. The first stop token and all that follows
    it belong to none.

    Args:
        where: `file:row`, for messages.
    Raises:
        DataError: from the labeller, for the row.
        RLError: for labels that overlap or leave the text.
    """
    ids = tokenizer.answer_ids(ids)
    text = tokenizer.decode(ids)
    parts = sorted(labeller(row, text, where))
    end = 0
    for part in parts:
        if not end <= part.start < part.stop <= len(text):
            raise RLError(
                f"{where}: a label of characters {part.start} to {part.stop}, the one before ends "
                f"at {end} and the text at {len(text)}; labels may be neither empty nor overlap"
            )
        end = part.stop
    # The part that each token belongs to, -1 for none; the tokens of a part are consecutive.
    owners = [_owner(parts, *piece) for piece in token_pieces(ids, tokenizer)]
    return [
        Label(owners.index(i), len(owners) - owners[::-1].index(i), part.skill, part.correct)
        for i, part in enumerate(parts)
        if i in owners
    ]


def answer_labels(
    row: Row, tokenizer: Tokenizer, labeller: Labeller, where: str
) -> tuple[int, list[Label]]:
    """Returns the number of tokens of a row's own answer with its stop, and its labels in tokens. A
    training sample ends with these tokens.

    Args:
        where: `file:row`, for messages.
    Raises:
        DataError: for a row that does not end with an answer, and from the labeller.
        RLError: for labels that overlap or leave the text.
    """
    last = check_messages(row, where)[-1]
    if last.role != "assistant":
        raise DataError(
            f"{where}: the last of {len(row['messages'])} messages is a {last.role} turn; skills "
            "are labelled in the row's own answer, end with an assistant turn"
        )
    ids = tokenizer.encode(answer_text(last))
    return len(ids) + 1, token_labels(row, ids, tokenizer, labeller, where)


def check_taught(row: Row, labels: Sequence[Label], labeller: Labeller, where: str) -> None:
    """Checks the labels of a row's own answer before it is taught: clauses that are not the spans
    would be taught as another one's skill. (Of a completion they are mistakes, and a probe leaves
    them out.) Whether another labeller's parts are right says nothing of their skill.

    Raises:
        DataError: a clause is not its span.
    """
    if getattr(labeller, "func", labeller) is not clauses:
        return
    for number, label in enumerate(labels, start=1):
        if not label.correct:
            raise DataError(
                f"{where}: clause {number} of its answer is not its span {number} "
                f"({row['spans'][number - 1]['text']!r}); spans name the clauses in their order, "
                f"which {BETWEEN!r} parts"
            )


def _owner(parts: Sequence[Label], start: int, stop: int) -> int:
    shares = [min(stop, part.stop) - max(start, part.start) for part in parts]
    best = max(range(len(parts)), key=shares.__getitem__, default=-1)
    return best if best >= 0 and shares[best] > 0 else -1


def token_pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Returns for each token the characters [start, stop) of `tokenizer.decode(ids)` that it
    writes. Tokens that only together make a character all write it. A token that writes nothing (an
    id beyond the vocabulary) is taken with the next character.

    The text of a token depends on a few before it (spaces at the beginning, bytes of a character).
    A piece is the difference of two short texts: decoding every prefix would take quadratic time.
    """
    ends, length, known, done = [], 0, 0, 0
    for here in range(1, len(ids) + 1):
        before, now = tokenizer.decode(ids[known:done]), tokenizer.decode(ids[known:here])
        # A replacement character stands for a character whose bytes are not complete, unless
        # nothing follows.
        if len(now) > len(before) and (not now.endswith("\ufffd") or here == len(ids)):
            length += len(now) - len(before)
            known, done = done, here
        ends.append(length)
    starts = [0, *ends][:-1]
    pieces, stop = [], length
    for start, end in zip(reversed(starts), reversed(ends), strict=True):
        stop = end if end > start else stop
        pieces.append((start, max(start, stop)))
    return pieces[::-1]


def _spans(row: Row, where: str) -> list[Mapping[str, str]]:
    """Returns the row's `spans`, each with texts `text` and `skill`; none without such a column."""
    spans = row.get("spans")
    if spans is None:
        return []
    if not isinstance(spans, list):
        raise DataError(f"{where}: 'spans' is a {type(spans).__name__}; write a list of objects")
    for number, span in enumerate(spans, start=1):
        for key in ("text", "skill"):
            if not isinstance(span, dict) or not isinstance(span.get(key), str) or not span[key]:
                raise DataError(
                    f"{where}: span {number} of {len(spans)} has no text {key!r}; a span is an "
                    'object such as {"text": "cell 5 is 6", "skill": "ocr"}'
                )
        _check_skill(span["skill"], where)
    return spans


def _check_skill(skill: str, where: str) -> None:
    """Checks that results tell a skill from its form."""
    if "/" in skill:
        raise DataError(
            f"{where}: skill {skill!r} holds '/', behind which results name a question's form; "
            f"write {skill.replace('/', '-')!r}"
        )

"""Rewards that read the completion as boxes or as JSON."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_mm.rl.rewards.text import Values, answer_part, text_of

_SIDE = r"([-\u2212]?(?:\d{1,9}(?:\.\d{0,20})?|\.\d{1,20})(?:[eE][-+]?\d{1,2})?)"
_COMMA = r"\s*(?:,|\s)\s*"
_BOX = re.compile(
    rf"[\[(]\s*{_SIDE}{_COMMA}{_SIDE}(?:{_COMMA}|\s*[)\]]\s*,?\s*[(\[]\s*)"
    rf"{_SIDE}{_COMMA}{_SIDE}\s*[\])]"
)
_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
MAX_TRIES = 50  # brackets that open nothing, before JSON is given up


def box_iou(completions, ground_truth, *, threshold: float | None = None, **columns) -> Values:
    """Returns the intersection over union of boxes [x1, y1, x2, y2], read from the text wherever
    four numbers stand in brackets; only in the last <answer> or \\boxed{}, where there is one, and
    after </think>. Several boxes are paired for the highest sum, which is divided by the larger
    number of boxes, so that further guesses cost. With a threshold, returns 1 where that mean
    reaches it, else 0. Numbers are compared as they are: answer and truth use one scale.

    Raises:
        ValueError: the truth holds no box, or one without area.
    """
    rewards: Values = []
    for completion, truth in zip(completions, ground_truth, strict=True):
        if truth is None:
            rewards.append(None)
            continue
        true = boxes_in(truth if isinstance(truth, str) else json.dumps(truth))
        if not true:
            raise ValueError(f"ground_truth {truth!r} holds no box [x1, y1, x2, y2]")
        if any(box[0] == box[2] or box[1] == box[3] for box in true):
            raise ValueError(f"ground_truth {truth!r} holds a box without area")
        share = _matched_iou(boxes_in(answer_part(text_of(completion))), true)
        rewards.append(share if threshold is None else float(share >= threshold))
    return rewards


Box = tuple[float, float, float, float]


def boxes_in(text: str) -> list[Box]:
    """Returns the boxes in a text: [x1, y1, x2, y2] or (x1,y1),(x2,y2), corners in any order."""
    found = [tuple(float(v.replace("\u2212", "-")) for v in match) for match in _BOX.findall(text)]
    return [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in found]


def iou(one: Box, other: Box) -> float:
    """Returns the intersection over union of two boxes; 0 if both are empty."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return shared / (areas - shared) if areas > shared else 0.0


def _matched_iou(found: Sequence[Box], true: Sequence[Box]) -> float:
    if len(found) == len(true) == 1:
        return iou(found[0], true[0])
    if not found:
        return 0.0
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    table = np.array([[iou(f, t) for t in true] for f in found])
    return float(table[linear_sum_assignment(-table)].sum()) / max(table.shape)


def json_match(completions, ground_truth, **columns) -> Values:
    """Returns the share of values that equal the truth's at the same place; places that only one
    side has count as wrong. The JSON is the whole text (of the last <answer>, where there is one),
    else the last code block, else the last object or list in the text. A key that stands twice in
    an object, NaN and Infinity make it none.

    Raises:
        ValueError: the truth is no JSON.
    """
    rewards: Values = []
    for completion, truth in zip(completions, ground_truth, strict=True):
        text = answer_part(text_of(completion))
        rewards.append(None if truth is None else _json_share(text, truth))
    return rewards


def _json_share(text: str, truth: Any) -> float:
    try:
        expected = dict(_leaves(_strict(truth) if isinstance(truth, str) else truth))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"ground_truth {truth!r:.100} is no JSON: {error}") from None
    try:
        found = dict(_leaves(_find_json(text)))
    except (ValueError, RecursionError):  # no JSON, or nested too deep to be meant
        return 0.0
    right = sum(path in found and _same(found[path], v) for path, v in expected.items())
    return right / len(found.keys() | expected.keys())


def _find_json(text: str) -> Any:
    """Reads the JSON of an answer; raises ValueError without one."""
    try:
        return _strict(text)
    except ValueError:
        blocks = _FENCE.findall(text)
        if blocks:
            return _strict(blocks[-1])
    found: list[Any] = []
    at, tries = 0, 0
    while (start := _OPENS.search(text, at)) and tries < MAX_TRIES:
        try:
            value, at = _DECODER.raw_decode(text, start.start())
            found.append(value)
        except (ValueError, RecursionError):
            at, tries = start.end(), tries + 1
    if not found:
        raise ValueError("no JSON")
    return found[-1]


def _no_twin(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return dict(pairs)


def _not_a_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_OPENS = re.compile(r"[{\[]")
_DECODER = json.JSONDecoder(object_pairs_hook=_no_twin, parse_constant=_not_a_number)
_strict = _DECODER.decode


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields (place, value) of every leaf; an empty object or list is a leaf."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list) and value:
        for place, inner in enumerate(value):
            yield from _leaves(inner, (*path, place))
    else:
        yield path, value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, str) and isinstance(other, str):
        return unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)
    # In Python true is 1; in JSON it is not.
    return one == other and isinstance(one, bool) == isinstance(other, bool)

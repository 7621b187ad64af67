"""Rewards that read the completion as a number, as boxes or as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_mm.rl.rewards.text import Values, each

# A sign belongs to a number unless a word or a bracket stands right before it: 5-3 ends in 3.
_NUMBER = (
    r"(?:(?<![\w)])[-+\u2212])?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
)
_BOX = re.compile(r"[\[(]\s*" + r"[,\s)\](]+".join([r"(-?\d+(?:\.\d+)?)"] * 4) + r"\s*[\])]")


def numeric(
    completions, ground_truth, tolerance: float = 1e-6, relative_tolerance: float = 0.0, **columns
) -> Values:
    """Returns 1 if the completion's last number (in a \\boxed{} if there is one) is within
    tolerance + relative_tolerance * |truth| of the truth, else 0."""

    def near(text: str, truth: Any) -> bool:
        boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
        found, true = last_number(boxed[-1] if boxed else text), last_number(str(truth))
        if true is None:
            raise ValueError(f"ground_truth {truth!r} holds no number")
        return found is not None and abs(found - true) <= tolerance + relative_tolerance * abs(true)

    return each(completions, ground_truth, near)


def last_number(text: str) -> float | None:
    """Returns the last number of a text; forms such as 1,234.5 and -1e-3 count. None if there is
    none."""
    found = re.findall(_NUMBER, text)
    if not found:
        return None
    value = float(found[-1].replace(",", "").replace("\u2212", "-"))
    return value if math.isfinite(value) else None


def box_iou(completions, ground_truth, threshold: float | None = None, **columns) -> Values:
    """Returns the intersection over union of boxes [x1, y1, x2, y2], read from the text wherever
    four numbers stand in brackets. Several boxes are paired for the highest sum, which is divided
    by the larger number of boxes. With a threshold, returns 1 where that mean reaches it, else
    0."""

    def overlap(text: str, truth: Any) -> float:
        true = boxes_in(truth if isinstance(truth, str) else json.dumps(truth))
        if not true:
            raise ValueError(f"ground_truth {truth!r} holds no box [x1, y1, x2, y2]")
        share = _matched_iou(boxes_in(text), true)
        return share if threshold is None else float(share >= threshold)

    return each(completions, ground_truth, overlap)


Box = tuple[float, float, float, float]


def boxes_in(text: str) -> list[Box]:
    """Returns the boxes in a text: [x1, y1, x2, y2] or (x1,y1),(x2,y2), corners in any order."""
    found = [tuple(float(v) for v in match) for match in _BOX.findall(text)]
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
    side has count as wrong. JSON may stand in a code block or after some text."""

    def share(text: str, truth: Any) -> float:
        true = json.loads(truth) if isinstance(truth, str) else truth
        try:
            found = dict(_leaves(_find_json(text)))
        except (ValueError, RecursionError):  # no JSON, or nested too deep to be meant
            return 0.0
        expected = dict(_leaves(true))
        right = sum(path in found and _same(found[path], v) for path, v in expected.items())
        return right / len(found.keys() | expected.keys())

    return each(completions, ground_truth, share)


def _find_json(text: str) -> Any:
    """Reads the text as JSON, else the first object or list in it; raises ValueError without
    one."""
    try:
        return json.loads(text)
    except ValueError:
        start = re.search(r"[{\[]", text)
        if start is None:
            raise
        return json.JSONDecoder().raw_decode(text, start.start())[0]


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
    # In Python true is 1; in JSON it is not.
    return one == other and isinstance(one, bool) == isinstance(other, bool)

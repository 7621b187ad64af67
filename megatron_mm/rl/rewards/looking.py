"""Rewards for looking (active vision, letter Q of the layer pattern).

`looked` says where a completion looked: for every query the place [y, x, scale] of each glimpse, in
shares of the image, in the order of the layer pattern. Without glimpses there is no such column.
"""

from __future__ import annotations

from typing import Any

from megatron_mm.config.layers.queries import window
from megatron_mm.rl.rewards.structured import iou
from megatron_mm.rl.rewards.text import Values
from megatron_mm.rl.rewards.text import scorer as share_right


def look_if_right(completions, ground_truth, looked, scorer, **columns) -> Values:
    """Returns 1 for a completion that looked and is wholly right by the row's own `scorer`, else 0:
    looking pays only where it led to the answer (DeepEyes, arXiv 2505.14362, section 3.3)."""
    right = share_right(completions, ground_truth, scorer)
    return [
        None if share is None else float(share == 1 and bool(places))
        for share, places in zip(right, looked, strict=True)
    ]


def look_iou(completions, looked, looks, **columns) -> Values:
    """Returns the mean intersection over union of the windows that were asked for and the boxes of
    the row's `looks` for its last answer, both in their order; a window or a box without the other
    counts as 0. The first glimpse counts where a query has several. A row without boxes gives
    None."""
    return [_overlap(places, boxes) for places, boxes in zip(looked, looks, strict=True)]


def _overlap(places: list[Any], boxes: list[Any] | None) -> float | None:
    known = [entry for entry in boxes or [] if entry is not None]
    if not known:
        return None
    pairs = zip(places, boxes or [], strict=False)
    found = [iou(window(place[0]), tuple(entry["box"])) for place, entry in pairs if entry]
    spare = max(0, len(places) - len(boxes or []))
    return sum(found) / (len(known) + spare)

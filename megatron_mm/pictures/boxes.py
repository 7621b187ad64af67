"""Boxes of images: checked, and rounded to whole pixels. Imports no numpy."""

from __future__ import annotations

import math
from typing import Any

from megatron_mm.errors import DataError

Box = tuple[float, float, float, float]  # left, top, right, bottom in shares of an image


def read_box(given: Any, at: str) -> Box:
    """Returns a box that is given as a list of four numbers.

    Args:
        at: names what has the box, for messages.

    Raises:
        DataError: they are no shares of an image, or no part of it lies between them.
    """
    numbers = given if isinstance(given, list) else []
    if len(numbers) != 4 or not all(type(x) in (int, float) and 0 <= x <= 1 for x in numbers):
        raise DataError(f"{at} has the box {given!r:.80}; allowed: 4 shares of the image, 0 to 1")
    left, top, right, bottom = map(float, numbers)
    if left >= right or top >= bottom:
        raise DataError(
            f"{at} has the box {given}; its left and top must be below its right and bottom"
        )
    return left, top, right, bottom


def pixel_box(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """Returns left, top, right and bottom of a box in pixels of an image of `width` x `height`:
    left and top are rounded down, right and bottom up, and one pixel at least lies between them."""
    left, right = _pixels(box[0], box[2], width)
    top, bottom = _pixels(box[1], box[3], height)
    return left, top, right, bottom


def _pixels(begin: float, end: float, side: int) -> tuple[int, int]:
    # 1/49 x 49 is below 1, and shares come in float32 or with six digits: one that was made of a
    # pixel must give that pixel.
    first = min(math.floor(round(begin * side, 3)), side - 1)
    return first, max(math.ceil(round(end * side, 3)), first + 1)

"""Boxes that are no part of an image: each is a bad row, by file and number."""

from __future__ import annotations

import re

import pytest

from megatron_mm.data.files.rows import open_row_files
from megatron_mm.data.loading.reader import Place, Reader
from megatron_mm.data.loading.shuffle import RowGroupCache

SHARES = "; allowed: 4 shares of the image, 0 to 1"
ORDER = "; its left and top must be below its right and bottom"
BAD = {
    "outside, right": ([0, 0, 1.01, 1], SHARES),
    "outside, left": ([-0.01, 0, 1, 1], SHARES),
    "pixels": ([0, 0, 50, 30], SHARES),
    "inverted": ([0.5, 0, 0.4, 1], ORDER),
    "upwards": ([0, 0.5, 1, 0.4], ORDER),
    "empty": ([0.5, 0, 0.5, 1], ORDER),
    "three": ([0, 0, 1], SHARES),
    "five": ([0, 0, 1, 1, 1], SHARES),
    "none": ([], SHARES),
    "a text": ("0,0,1,1", SHARES),
    "texts": (["0", "0", "1", "1"], SHARES),
    "a number": (1, SHARES),
    "false": (False, SHARES),
    "an object": ({"left": 0, "top": 0, "right": 1, "bottom": 1}, SHARES),
    "lists": ([[0], [0], [1], [1]], SHARES),
    "truths": ([False, False, True, True], SHARES),
    "nulls": ([None] * 4, SHARES),
    "not a number": ([0, 0, float("nan"), 1], SHARES),
    "without an end": ([0, 0, float("inf"), 1], SHARES),
    "a huge integer": ([0, 0, 10**400, 1], SHARES),
}


def errors(run, tokenizer, path):
    """Returns the errors of building and measuring the last row."""
    source = open_row_files(path, RowGroupCache())
    reader, place = Reader(run, tokenizer, [source]), Place(0, len(source) - 1)
    return [*reader.build([place]), *reader.prompts([place]), *reader.measure([place])]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_box_is_one_line(run, tokenizer, write_rows, make_row, kind):
    box, reason = BAD[kind]
    images = ["small.png", {"path": "wide.png", "box": box}]
    path = write_rows(make_row(), make_row("<image><image>?", images=images))
    for error in errors(run, tokenizer, path):
        assert error.startswith(f"{path}:2: image 2 has the box ") and error.endswith(reason)
        assert "\n" not in error and len(error) < len(str(path)) + 200


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ({"box": [0, 0, 1, 1]}, "image 1 is a box of nothing; add its path or bytes"),
        ({"box": [0, 0, 1, 1], "path": None}, "image 1 is a box of nothing; add its path or bytes"),
        ({"box": [0, 0, 1, 1], "path": 3}, "image 1 is of type dict with the keys box, path"),
        ([0, 0, 1, 1], "image 1 is of type list; use a path, bytes or {'bytes': ..., 'path': ..."),
        ({"path": "wide.png", "boxes": [0]}, "image 1 is of type dict with the keys path, boxes"),
        ({"path": "../a.png", "box": [0, 0, 1, 1]}, "image path '../a.png' leaves the data folder"),
        ({"path": "no.png", "box": [0, 0, 1, 1]}, "no.png does not exist; correct the path in the"),
        ({"path": "", "box": [0, 0, 1, 1]}, "image path '' is not a file name"),
    ],
)
def test_a_box_needs_an_image(run, tokenizer, write_rows, make_row, image, reason):
    path = write_rows(make_row(), make_row("<image>?", images=[image]))
    for error in errors(run, tokenizer, path):
        assert error.startswith(f"{path}:2: image ") and "\n" not in error
        assert re.search(re.escape(reason), error), error


def test_a_box_beside_the_images_is_used_by_nothing(run, tokenizer, write_rows, make_row):
    path = write_rows(make_row("<image>?", images=["wide.png"], box=[0, 0, 1, 1]))
    for error in errors(run, tokenizer, path):
        assert error.startswith(f"{path}:1: nothing uses 1 of the row's 3 keys ('box')")

"""Boxes in pixels, against cases worked out by hand and against every pixel of a side."""

from __future__ import annotations

import pytest

from megatron_mm.pictures.boxes import pixel_box, read_box

ALMOST = 1 - 2**-53  # times 50 it is 50


@pytest.mark.parametrize(
    ("box", "pixels"),
    [
        ((0, 0, 1, 1), (0, 0, 50, 30)),
        ((0.2, 0.1, 0.8, 0.4), (10, 3, 40, 12)),
        ((0.21, 0.11, 0.79, 0.39), (10, 3, 40, 12)),  # 10.5, 3.3, 39.5, 11.7
        ((0.999, 0.999, 0.9991, 0.9991), (49, 29, 50, 30)),
        ((0.5, 0.5, 0.5 + 1e-12, 0.5 + 1e-12), (25, 15, 26, 16)),
        ((0, 0, 5e-324, 5e-324), (0, 0, 1, 1)),
        ((ALMOST, ALMOST, 1, 1), (49, 29, 50, 30)),
    ],
)
def test_edges_are_rounded_outwards_and_a_pixel_is_left(box, pixels):
    assert pixel_box(read_box([*box], "a box"), 50, 30) == pixels


def test_an_image_of_one_pixel_is_all_of_it():
    assert pixel_box((0.4, 0.7, 0.6, 0.8), 1, 1) == (0, 0, 1, 1)


@pytest.mark.parametrize("side", [1, 3, 49, 103, 4095, 2**26])
def test_shares_that_are_pixels_of_a_side_give_these_pixels(side):
    """1/49 x 49 is below 1."""
    for pixel in {*range(min(side, 4095)), side - 1}:
        begin, end = pixel / side, (pixel + 1) / side
        expected = (pixel, pixel, pixel + 1, pixel + 1)
        assert pixel_box((begin, begin, end, end), side, side) == expected

"""Digit scenes, the built-in task: questions about a grid of real handwritten digits.

A scene's cells are its digits. `asking.py` says what forms a question has.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np

from examples.digits.asking import (
    Made,
    Scans,
    Scenes,
    Span,
    enlarged,
    hop_path,
    neighbour,
    render,
    span,
)

# Relative frequency of each key in the mixed stage. Reading and written-out hops are most frequent.
DEFAULT_WEIGHTS = {
    "transcribe": 3.0,
    "ocr": 3.0,
    "count": 1.0,
    "spatial": 1.0,
    "arithmetic": 1.0,
    "multihop": 1.0,
    "transcribe/steps": 1.0,
    "ocr/steps": 1.0,
    "count/steps": 1.0,
    "spatial/steps": 1.0,
    "arithmetic/steps": 1.0,
    "multihop/steps": 4.0,
    "count/free": 0.5,
    "spatial/free": 0.5,
    "arithmetic/free": 0.5,
    "multihop/free": 0.5,
}
PHRASES = (
    *(
        "user\n",
        "assistant\n",
        "? Show steps.",
        "? Show steps or not.",
        "Read all cells",
        "Read row ",
        "Read cells ",
        "Digit in cell ",
    ),
    *("How many ", "Sum of row ", "Hop once from cell ", "Hop twice from cell "),
    *("Left of cell ", "Right of cell ", "Above cell ", "Below cell "),
    *("cell ", ", cell ", " is ", ", total ", "total "),
    *("left is cell ", "right is cell ", "above is cell ", "below is cell "),
)


def draw(
    scans: Scans, grid: int, jitter: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[int]]:
    """Draws a scene, uint8 [grid*16, grid*16]. Returns it and the digits of its cells."""
    pictures, targets = scans
    chosen = rng.integers(len(pictures), size=grid**2)
    shifts = rng.integers(-jitter, jitter + 1, size=(grid**2, 2))
    image = render([enlarged(pictures[scan]) for scan in chosen], grid, shifts)
    return image, [int(digit) for digit in targets[chosen]]


def _read(cell: int, digits: Sequence[int], skill: str = "ocr") -> Span:
    return span(f"cell {cell} is {digits[cell]}", skill, digits[cell])


def _transcribe(digits: Sequence[int], grid: int, rng: Random) -> Made:
    kind = rng.random()
    if kind < 0.3:
        cells = list(range(grid * grid))
        question = "Read all cells"
    elif kind < 0.6:
        row = rng.randrange(grid)
        cells = list(range(row * grid, (row + 1) * grid))
        question = f"Read row {row}"
    else:
        cells = rng.sample(range(grid * grid), grid)
        question = f"Read cells {' '.join(str(c) for c in cells)}"
    answer = " ".join(str(digits[c]) for c in cells)
    return question, answer, [_read(c, digits, "transcribe") for c in cells]


def _ocr(digits: Sequence[int], grid: int, rng: Random) -> Made:
    cell = rng.randrange(grid * grid)
    return f"Digit in cell {cell}", str(digits[cell]), [_read(cell, digits)]


def _count(digits: Sequence[int], grid: int, rng: Random) -> Made:
    del grid
    # The count is drawn first, because a random digit mostly occurs 0 or 1 times.
    by_count: dict[int, list[int]] = {}
    for digit in range(10):
        by_count.setdefault(sum(d == digit for d in digits), []).append(digit)
    count = rng.choice(sorted(by_count))
    digit = rng.choice(by_count[count])
    found = [_read(c, digits) for c, d in enumerate(digits) if d == digit]
    return f"How many {digit}", str(count), [*found, span(f"total {count}", "count", count)]


def _spatial(digits: Sequence[int], grid: int, rng: Random) -> Made:
    name, words, cell, target = neighbour(grid, rng)
    spans = [span(f"{name} is cell {target}", "spatial", target), _read(target, digits)]
    return f"{words} {cell}", str(digits[target]), spans


def _arithmetic(digits: Sequence[int], grid: int, rng: Random) -> Made:
    row = rng.randrange(grid)
    cells = range(row * grid, (row + 1) * grid)
    total = sum(digits[c] for c in cells)
    spans = [*(_read(c, digits) for c in cells), span(f"total {total}", "arithmetic", total)]
    return f"Sum of row {row}", str(total), spans


def _multihop(digits: Sequence[int], grid: int, rng: Random) -> Made | None:
    del grid
    hops = rng.choice((1, 2))
    path = hop_path(digits, hops, rng)
    return (
        None
        if path is None
        else _hops(digits, path, f"Hop {'once' if hops == 1 else 'twice'} from cell")
    )


def _longer(digits: Sequence[int], grid: int, rng: Random) -> Made | None:
    """Asks for three hops in words that the model knows, one question inside the other."""
    del grid
    path = hop_path(digits, 3, rng)
    return None if path is None else _hops(digits, path, "Hop twice from cell Hop once from cell")


def _hops(digits: Sequence[int], path: Sequence[int], words: str) -> Made:
    spans = [_read(path[0], digits), *(_read(c, digits, "multihop") for c in path[1:])]
    return f"{words} {path[0]}", str(digits[path[-1]]), spans


DIGITS = Scenes(
    weights=DEFAULT_WEIGHTS,
    reading=("transcribe", "transcribe/steps"),
    phrases=PHRASES,
    questions={
        "transcribe": _transcribe,
        "ocr": _ocr,
        "count": _count,
        "spatial": _spatial,
        "arithmetic": _arithmetic,
        "multihop": _multihop,
    },
    longer=_longer,
    word_by_word=frozenset({"transcribe"}),
    draw=draw,
    text=lambda digits: "".join(str(d) for d in digits),
)

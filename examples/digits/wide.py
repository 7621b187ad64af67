"""Wide scenes: a grid of digits and shapes in coloured cells, and nine skills that differ more than
those about digits alone. Two thirds of the cells show a handwritten digit, the others a shape.

A cell is (colour, thing): a thing is a digit, int, or the name of a shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np

from examples.digits.asking import (
    CELL_SIZE,
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

# Of a cell's ground. Digits and shapes are white: a model this small does not learn to read digits
# of four colours (10 % after 1,600 steps, colours 99 %).
COLOURS = {"red": (110, 0, 0), "green": (0, 100, 0), "blue": (0, 0, 120), "yellow": (90, 90, 0)}
SHAPES = ("circle", "square", "triangle", "cross")
SHAPE_SHARE = 1 / 3  # of the cells
ORDER = {"Smallest": 0, "Middle": 1, "Largest": 2}

Cell = tuple[str, int | str]

# Relative frequency of each key in the mixed stage, as for digits.
WEIGHTS = {
    "ocr": 3.0,
    **{key: 2.0 for key in ("colour", "shape", "find")},
    **{f"{skill}/steps": 1.0 for skill in ("ocr", "colour", "shape", "find")},
    **{skill: 1.0 for skill in ("spatial", "count", "compare", "order", "multihop")},
    **{f"{skill}/steps": 2.0 for skill in ("spatial", "count", "compare", "order")},
    "multihop/steps": 4.0,
    **{f"{skill}/free": 0.5 for skill in ("spatial", "count", "compare", "order", "multihop")},
}
PHRASES = (
    *("user\n", "assistant\n", "? Show steps.", "? Show steps or not."),
    *("Digits in cells ", "Colours of cells ", "Shapes in cells ", "Cell of ", "How many "),
    *("Same colour in cells ", *(f"{word} of cells " for word in ORDER), "Hop ", " from cell "),
    *("Left of cell ", "Right of cell ", "Above cell ", "Below cell "),
    *("cell ", ", cell ", " is ", " in ", " shows ", " is cell ", ", total ", "total "),
    *("left is cell ", "right is cell ", "above is cell ", "below is cell "),
    *(f", {word.lower()} " for word in ORDER),
    *(", same ", "yes", "no", *COLOURS, *SHAPES, *(f" {shape}" for shape in SHAPES)),
)


def shape_mask(shape: str) -> np.ndarray:
    """Returns the pixels of a shape, bool [16, 16]."""
    y, x = np.mgrid[:CELL_SIZE, :CELL_SIZE] - (CELL_SIZE - 1) / 2
    return {
        "circle": x**2 + y**2 <= 36,
        "square": np.maximum(abs(x), abs(y)) <= 5,
        "triangle": (abs(y) <= 5.5) & (abs(x) <= (y + 5.5) / 2),
        "cross": (np.minimum(abs(x), abs(y)) <= 1.5) & (np.maximum(abs(x), abs(y)) <= 5.5),
    }[shape]


def draw(
    scans: Scans, grid: int, jitter: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[Cell]]:
    """Draws a scene, uint8 [grid*16, grid*16, 3]. Returns it and its cells."""
    pictures, targets = scans
    tiles, cells = [], []
    for _ in range(grid**2):
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        thing: int | str
        if rng.random() < SHAPE_SHARE:
            thing = SHAPES[rng.integers(len(SHAPES))]
            light = shape_mask(thing) * 1.0
        else:
            chosen = rng.integers(len(pictures))
            thing, light = int(targets[chosen]), enlarged(pictures[chosen]) / 255
        tiles.append((light * 255).round().astype(np.uint8))
        cells.append((colour, thing))
    shifts = rng.integers(-jitter, jitter + 1, size=(grid**2, 2))
    light = render(tiles, grid, shifts)[:, :, None] / 255
    grounds = [np.full((CELL_SIZE, CELL_SIZE, 3), COLOURS[colour]) for colour, _ in cells]
    ground = render(grounds, grid, np.zeros_like(shifts))
    return (ground + light * (255 - ground)).round().astype(np.uint8), cells


def _digits(cells: Sequence[Cell]) -> list[int]:
    return [n for n, (_, thing) in enumerate(cells) if isinstance(thing, int)]


def _digit(cell: int, cells: Sequence[Cell], skill: str = "ocr") -> Span:
    return span(f"cell {cell} is {cells[cell][1]}", skill, cells[cell][1])


def _colour(cell: int, cells: Sequence[Cell]) -> Span:
    return span(f"cell {cell} in {cells[cell][0]}", "colour", cells[cell][0])


def _shape(cell: int, cells: Sequence[Cell]) -> Span:
    return span(f"cell {cell} shows {cells[cell][1]}", "shape", cells[cell][1])


def _some(cells: Sequence[int], rng: Random) -> list[int]:
    """Draws one of the cells, three of them, or all in their order, which is half of the time."""
    count = rng.choice((1, 3, len(cells), len(cells)))
    return list(cells) if count >= len(cells) else rng.sample(cells, count)


def _listed(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def _ocr_question(cells: Sequence[Cell], grid: int, rng: Random) -> Made | None:
    if not (known := _digits(cells)):
        return None
    chosen = _some(known, rng)
    answer = " ".join(str(cells[c][1]) for c in chosen)
    return f"Digits in cells {_listed(chosen)}", answer, [_digit(c, cells) for c in chosen]


def _colour_question(cells: Sequence[Cell], grid: int, rng: Random) -> Made:
    chosen = _some(range(len(cells)), rng)
    answer = " ".join(cells[c][0] for c in chosen)
    return f"Colours of cells {_listed(chosen)}", answer, [_colour(c, cells) for c in chosen]


def _shape_question(cells: Sequence[Cell], grid: int, rng: Random) -> Made | None:
    if not (known := [c for c in range(len(cells)) if c not in _digits(cells)]):
        return None
    chosen = _some(known, rng)
    answer = " ".join(str(cells[c][1]) for c in chosen)
    return f"Shapes in cells {_listed(chosen)}", answer, [_shape(c, cells) for c in chosen]


def _find(cells: Sequence[Cell], grid: int, rng: Random) -> Made | None:
    single = [n for n, cell in enumerate(cells) if cells.count(cell) == 1]
    if not single:
        return None
    cell = rng.choice(single)
    what = f"{cells[cell][0]} {cells[cell][1]}"
    return f"Cell of {what}", str(cell), [span(f"{what} is cell {cell}", "find", cell)]


def _spatial(cells: Sequence[Cell], grid: int, rng: Random) -> Made:
    name, words, cell, target = neighbour(grid, rng)
    thing = cells[target][1]
    read = _digit(target, cells) if isinstance(thing, int) else _shape(target, cells)
    return (
        f"{words} {cell}",
        str(thing),
        [span(f"{name} is cell {target}", "spatial", target), read],
    )


def _count(cells: Sequence[Cell], grid: int, rng: Random) -> Made:
    del grid
    colour = rng.choice(list(COLOURS))
    found = [_colour(n, cells) for n, cell in enumerate(cells) if cell[0] == colour]
    total = len(found)
    return f"How many {colour}", str(total), [*found, span(f"total {total}", "count", total)]


def _compare(cells: Sequence[Cell], grid: int, rng: Random) -> Made | None:
    pairs = [(a, b) for a in range(len(cells)) for b in range(len(cells)) if a != b]
    same = rng.random() < 0.5  # drawn first: of random pairs only a quarter are alike
    pairs = [(a, b) for a, b in pairs if (cells[a][0] == cells[b][0]) == same]
    if not pairs:
        return None
    chosen = rng.choice(pairs)
    answer = "yes" if same else "no"
    spans = [*(_colour(c, cells) for c in chosen), span(f"same {answer}", "compare", answer)]
    return f"Same colour in cells {_listed(chosen)}", answer, spans


def _order(cells: Sequence[Cell], grid: int, rng: Random) -> Made | None:
    if len(known := _digits(cells)) < 3:
        return None
    chosen = rng.sample(known, 3)
    word = rng.choice(list(ORDER))
    answer = sorted(int(cells[c][1]) for c in chosen)[ORDER[word]]
    spans = [*(_digit(c, cells) for c in chosen), span(f"{word.lower()} {answer}", "order", answer)]
    return f"{word} of cells {_listed(chosen)}", str(answer), spans


def _multihop(cells: Sequence[Cell], grid: int, rng: Random) -> Made | None:
    return _hops(cells, rng.choice((1, 2)), rng)


def _longer(cells: Sequence[Cell], grid: int, rng: Random) -> Made | None:
    return _hops(cells, 3, rng)


def _hops(cells: Sequence[Cell], hops: int, rng: Random) -> Made | None:
    path = hop_path([thing for _, thing in cells], hops, rng)
    if path is None:
        return None
    spans = [_digit(path[0], cells), *(_digit(c, cells, "multihop") for c in path[1:])]
    return f"Hop {hops} from cell {path[0]}", str(cells[path[-1]][1]), spans


WIDE = Scenes(
    weights=WEIGHTS,
    reading=("ocr", "shape", "ocr/steps", "colour/steps", "ocr", "ocr/steps"),  # digits are hardest
    phrases=PHRASES,
    questions={
        "ocr": _ocr_question,
        "colour": _colour_question,
        "shape": _shape_question,
        "find": _find,
        "spatial": _spatial,
        "count": _count,
        "compare": _compare,
        "order": _order,
        "multihop": _multihop,
    },
    longer=_longer,
    word_by_word=frozenset({"ocr", "colour", "shape"}),
    draw=draw,
    text=lambda cells: " ".join(f"{colour} {thing}" for colour, thing in cells),
)

"""Digit scenes, the built-in task: questions about a grid of real handwritten digits.

Cells are counted from 0, row by row: cell 4 is the centre of a 3x3 grid, row 0 the top row. Every
question has a `direct` form (only the answer) and a `steps` form (every step written out as a span
with its own skill and value, which the scene can verify). A `free` question leaves the form to the
model: its tuning data mostly answer directly, and reinforcement learning finds out which form is
right more often.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np

SCAN_SIZE = 8  # pixels along one side of a scan in scikit-learn's bundled set
CELL_SIZE = 16  # pixels along one side of a cell in a scene
HELD_OUT_SCANS = 397  # the last ones, shown only in validation scenes

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
FREE_KEYS = tuple(key for key in DEFAULT_WEIGHTS if key.endswith("/free"))
WRITTEN_OUT = 0.1  # share of the free questions whose steps are shown
ENDINGS = {"direct": "?", "steps": "? Show steps.", "free": "? Show steps or not."}

# Each is one token in the demo's tokenizer, since training time is proportional to tokens.
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

# Name, question, step (rows down, columns right).
DIRECTIONS = (
    ("left", "Left of cell", 0, -1),
    ("right", "Right of cell", 0, 1),
    ("above", "Above cell", -1, 0),
    ("below", "Below cell", 1, 0),
)

Row = dict[str, Any]
Span = dict[str, str]


def load_scans(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns scans, uint8 [n, 8, 8] (0 to 255), and digits, int [n], of the training part of
    scikit-learn's set or of the held-out rest."""
    from sklearn.datasets import load_digits  # slow to import

    data = load_digits()
    part = slice(-HELD_OUT_SCANS, None) if held_out else slice(None, -HELD_OUT_SCANS)
    scans = (data.images[part] * (255.0 / 16.0)).round().astype(np.uint8)
    return scans, data.target[part]


def render(scans: np.ndarray, chosen: Sequence[int], grid: int, shifts: np.ndarray) -> np.ndarray:
    """Draws a scene, uint8 [grid*16, grid*16].

    Args:
        chosen: scan of each cell.
        shifts: int [cells, 2], moves each digit by (down, right) pixels inside its cell.
    """
    scale = CELL_SIZE // SCAN_SIZE
    scene = np.zeros((grid * CELL_SIZE, grid * CELL_SIZE), dtype=np.uint8)
    for cell, scan in enumerate(chosen):
        row, col = divmod(cell, grid)
        digit = scans[scan].repeat(scale, axis=0).repeat(scale, axis=1)
        moved = np.zeros_like(digit)
        down, right = (int(v) for v in shifts[cell])
        to_y, to_x = (
            slice(max(down, 0), CELL_SIZE + min(down, 0)),
            slice(max(right, 0), CELL_SIZE + min(right, 0)),
        )
        from_y, from_x = (
            slice(max(-down, 0), CELL_SIZE + min(-down, 0)),
            slice(max(-right, 0), CELL_SIZE + min(-right, 0)),
        )
        moved[to_y, to_x] = digit[from_y, from_x]
        scene[row * CELL_SIZE : (row + 1) * CELL_SIZE, col * CELL_SIZE : (col + 1) * CELL_SIZE] = (
            moved
        )
    return scene


def ask(key: str, digits: Sequence[int], grid: int, rng: Random) -> Row | None:
    """Asks a question of kind `key` ("ocr", "ocr/steps", ...) about a scene.

    Args:
        digits: digit of each cell, [grid*grid].

    Returns:
        A row without its image; None if the scene allows no such question.
    """
    skill, _, form = key.partition("/")
    form = form or "direct"
    made = _QUESTIONS[skill](digits, grid, rng)
    if made is None:
        return None
    question, answer, spans = made
    steps = ", ".join(span["text"] for span in spans)
    written = form == "steps" or (form == "free" and rng.random() < WRITTEN_OUT)
    if form == "direct":
        scorer = "per_word" if skill == "transcribe" else "exact"
        spans = [_span(answer, skill, answer)]
    else:
        scorer = "per_clause" if skill == "transcribe" else "last_word"
    return {
        "messages": [
            {"role": "user", "content": f"<image>{question}{ENDINGS[form]}"},
            {"role": "assistant", "content": steps if written else answer},
        ],
        "images": [],
        "skill": skill,
        "form": form,
        "ground_truth": answer,
        "scorer": scorer,
        "spans": spans,
        "scene": "".join(str(d) for d in digits),
    }


def _span(text: str, skill: str, value: object) -> Span:
    return {"text": text, "skill": skill, "value": str(value)}


def _read(cell: int, digits: Sequence[int], skill: str = "ocr") -> Span:
    return _span(f"cell {cell} is {digits[cell]}", skill, digits[cell])


Made = tuple[str, str, list[Span]]


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
    return f"How many {digit}", str(count), [*found, _span(f"total {count}", "count", count)]


def _spatial(digits: Sequence[int], grid: int, rng: Random) -> Made:
    name, words, down, right = rng.choice(DIRECTIONS)
    rows = [r for r in range(grid) if 0 <= r + down < grid]
    cols = [c for c in range(grid) if 0 <= c + right < grid]
    row, col = rng.choice(rows), rng.choice(cols)
    cell, target = row * grid + col, (row + down) * grid + col + right
    spans = [_span(f"{name} is cell {target}", "spatial", target), _read(target, digits)]
    return f"{words} {cell}", str(digits[target]), spans


def _arithmetic(digits: Sequence[int], grid: int, rng: Random) -> Made:
    row = rng.randrange(grid)
    cells = range(row * grid, (row + 1) * grid)
    total = sum(digits[c] for c in cells)
    spans = [*(_read(c, digits) for c in cells), _span(f"total {total}", "arithmetic", total)]
    return f"Sum of row {row}", str(total), spans


def _multihop(digits: Sequence[int], grid: int, rng: Random) -> Made | None:
    hops = rng.choice((1, 2))
    starts = list(range(min(grid * grid, 10)))
    rng.shuffle(starts)
    for start in starts:
        path = [start]
        # A digit without a cell (9 on a 3x3 grid) or with a cell already read ends the path.
        while len(path) <= hops and (to := digits[path[-1]]) < len(digits) and to not in path:
            path.append(to)
        if len(path) == hops + 1:
            spans = [_read(path[0], digits), *(_read(c, digits, "multihop") for c in path[1:])]
            word = "once" if hops == 1 else "twice"
            return f"Hop {word} from cell {start}", str(digits[path[-1]]), spans
    return None


_QUESTIONS = {
    "transcribe": _transcribe,
    "ocr": _ocr,
    "count": _count,
    "spatial": _spatial,
    "arithmetic": _arithmetic,
    "multihop": _multihop,
}

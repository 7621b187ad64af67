"""A kind of scene, and the rows that are made of its questions.

Every question has a `direct` form (only the answer) and a `steps` form (every step written out as a
span with its own skill and value, which the scene can verify). A `free` question leaves the form to
the model: its tuning data mostly answer directly, and reinforcement learning finds out which form
is right more often.

Cells are counted from 0, row by row: cell 4 is the centre of a 3x3 grid, row 0 the top row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

SCAN_SIZE = 8  # pixels along one side of a scan in scikit-learn's bundled set
CELL_SIZE = 16  # pixels along one side of a cell in a scene
HELD_OUT_SCANS = 397  # the last ones, shown only in validation scenes
WRITTEN_OUT = 0.1  # share of the free questions whose steps are shown
ENDINGS = {"direct": "?", "steps": "? Show steps.", "free": "? Show steps or not."}

# Name, question, step (rows down, columns right).
DIRECTIONS = (
    ("left", "Left of cell", 0, -1),
    ("right", "Right of cell", 0, 1),
    ("above", "Above cell", -1, 0),
    ("below", "Below cell", 1, 0),
)

Row = dict[str, Any]
Span = dict[str, str]
Made = tuple[str, str, list[Span]]  # question, answer, the spans of its steps
Scans = tuple[np.ndarray, np.ndarray]  # uint8 [n, 8, 8], their digits int [n]


@dataclass(frozen=True)
class Scenes:
    """A kind of scene.

    Attributes:
        weights: key of a question ("ocr", "ocr/steps", ...) -> its frequency in the mixed stage.
        reading: the keys of the first stage, which only reads.
        phrases: each is one token, since training time is proportional to tokens.
        questions: skill -> (cells, cells along a side, rng) -> a question; None if the scene
            allows none.
        longer: `multihop` with more hops than any question of the training data.
        word_by_word: skills whose answers have several words, scored one by one.
        draw: (scans, cells along a side, largest shift in pixels, rng) -> the image, uint8
            [side*16, side*16] or [side*16, side*16, 3], and the content of its cells.
        text: the content of the cells for a row's `scene`.
        vocabulary: most tokens of its tokenizer, x64 for speed.
    """

    weights: Mapping[str, float]
    reading: tuple[str, ...]
    phrases: tuple[str, ...]
    questions: Mapping[str, Callable[[Sequence, int, Random], Made | None]]
    longer: Callable[[Sequence, int, Random], Made | None]
    word_by_word: frozenset[str]
    draw: Callable[[Scans, int, int, np.random.Generator], tuple[np.ndarray, list]]
    text: Callable[[Sequence], str]
    vocabulary: int = 448

    @property
    def free_keys(self) -> tuple[str, ...]:
        return tuple(key for key in self.weights if key.endswith("/free"))

    def ask(
        self, key: str, cells: Sequence, grid: int, rng: Random, longer: bool = False
    ) -> Row | None:
        """Asks a question of kind `key` about a scene.

        Args:
            cells: content of each cell, [grid*grid].
            longer: more hops than in training; for `multihop`.
        Returns:
            a row without its image; None if the scene allows no such question.
        """
        skill, _, form = key.partition("/")
        form = form or "direct"
        made = (self.longer if longer else self.questions[skill])(cells, grid, rng)
        if made is None:
            return None
        question, answer, spans = made
        steps = ", ".join(span["text"] for span in spans)
        written = form == "steps" or (form == "free" and rng.random() < WRITTEN_OUT)
        words = skill in self.word_by_word
        if form == "direct":
            scorer = "per_word" if words else "exact"
            spans = [span(answer, skill, answer)]
        else:
            scorer = "per_clause" if words else "last_word"
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
            "scene": self.text(cells),
        }


def span(text: str, skill: str, value: object) -> Span:
    return {"text": text, "skill": skill, "value": str(value)}


def neighbour(grid: int, rng: Random) -> tuple[str, str, int, int]:
    """Draws a cell with a neighbour. Returns (direction, question's words, cell, neighbour)."""
    name, words, down, right = rng.choice(DIRECTIONS)
    rows = [r for r in range(grid) if 0 <= r + down < grid]
    cols = [c for c in range(grid) if 0 <= c + right < grid]
    row, col = rng.choice(rows), rng.choice(cols)
    return name, words, row * grid + col, (row + down) * grid + col + right


def hop_path(things: Sequence, hops: int, rng: Random) -> list[int] | None:
    """Draws the cells of a path: the digit in each names the next. None if the scene has none."""
    starts = list(range(min(len(things), 10)))
    rng.shuffle(starts)
    for start in starts:
        path = [start]
        # What is no digit, a digit without a cell (9 on a 3x3 grid), or one whose cell was already
        # read ends the path.
        while (
            len(path) <= hops
            and isinstance(to := things[path[-1]], int)
            and to < len(things)
            and to not in path
        ):
            path.append(to)
        if len(path) == hops + 1 and isinstance(things[path[-1]], int):
            return path
    return None


def load_scans(held_out: bool) -> Scans:
    """Returns the training part of scikit-learn's set of scans (0 to 255), or the held-out rest."""
    from sklearn.datasets import load_digits  # slow to import

    data = load_digits()
    part = slice(-HELD_OUT_SCANS, None) if held_out else slice(None, -HELD_OUT_SCANS)
    scans = (data.images[part] * (255.0 / 16.0)).round().astype(np.uint8)
    return scans, data.target[part]


def render(tiles: Sequence[np.ndarray], grid: int, shifts: np.ndarray) -> np.ndarray:
    """Draws a scene, uint8 [grid*16, grid*16, ...], of a tile [16, 16, ...] for each cell.

    Args:
        shifts: int [cells, 2], moves each tile by (down, right) pixels inside its cell.
    """
    moved = [
        _moved(tile, *(int(v) for v in shift)) for tile, shift in zip(tiles, shifts, strict=True)
    ]
    rows = [np.concatenate(moved[r * grid : (r + 1) * grid], axis=1) for r in range(grid)]
    return np.concatenate(rows)


def enlarged(scan: np.ndarray) -> np.ndarray:
    """Returns a scan at the size of a cell."""
    scale = CELL_SIZE // SCAN_SIZE
    return scan.repeat(scale, axis=0).repeat(scale, axis=1)


def _moved(tile: np.ndarray, down: int, right: int) -> np.ndarray:
    moved = np.zeros_like(tile)
    to_y, from_y = _overlap(down)
    to_x, from_x = _overlap(right)
    moved[to_y, to_x] = tile[from_y, from_x]
    return moved


def _overlap(by: int) -> tuple[slice, slice]:
    return (
        slice(max(by, 0), CELL_SIZE + min(by, 0)),
        slice(max(-by, 0), CELL_SIZE + min(-by, 0)),
    )

"""Digit scenes whose answers look: the demo's questions, always written out, with a `<look>` at
every cell that is read and the cell's box beside it (active vision, letter Q)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from examples.digits.asking import Row, Scenes
from examples.digits.scenes import DIGITS
from megatron_mm.data.looks import LOOKS
from megatron_mm.data.tokenizer import LOOK, LOOK_TOKENS

UNSAID = ("? Show steps or not.", "How many ", "Sum of row ", ", total ", "total ")  # never asked
READ = re.compile(r"cell (\d+) is (\d)\b")  # not "left is cell 4"
WEIGHTS = {"transcribe/steps": 1.0, "ocr/steps": 3.0, "spatial/steps": 2.0, "multihop/steps": 2.0}


@dataclass(frozen=True)
class LookingScenes(Scenes):
    """Scenes whose answers look at the cells that they read."""

    def ask(
        self, key: str, cells: Sequence, grid: int, rng: Random, longer: bool = False
    ) -> Row | None:
        """See `Scenes.ask`; the row has `looks`, the box of every cell that it looks at."""
        row = super().ask(key, cells, grid, rng, longer)
        return None if row is None else _looking(row, grid)


def _looking(row: Row, grid: int) -> Row:
    asked, answer = row["messages"]
    read = [int(cell) for cell, _ in READ.findall(answer["content"])]
    text = _with_looks(answer["content"])
    return row | {
        "messages": [asked, answer | {"content": text}],
        "spans": [span | {"text": _with_looks(span["text"])} for span in row["spans"]],
        LOOKS: [{"box": box_of(cell, grid)} for cell in read],
    }


def _with_looks(text: str) -> str:
    return READ.sub(rf"cell \1{LOOK} is \2", text)


def box_of(cell: int, grid: int) -> list[float]:
    """Returns left, top, right, bottom of a cell in shares of the image."""
    row, column = divmod(cell, grid)
    return [round(x / grid, 6) for x in (column, row, column + 1, row + 1)]


def without_looks(row: Row) -> Row:
    """Returns the row as a model without glimpses reads it."""
    asked, answer = row["messages"]
    spans = [span | {"text": span["text"].replace(LOOK, "")} for span in row["spans"]]
    plain = row | {
        "messages": [asked, answer | {"content": answer["content"].replace(LOOK, "")}],
        "spans": spans,
    }
    del plain[LOOKS]
    return plain


def without_boxes(rows: Sequence[Row], every: int) -> list[Row]:
    """Returns the rows with boxes in one of `every`, from the first; the others say any place."""
    return [
        row if n % every == 0 else row | {LOOKS: [None] * len(row[LOOKS])}
        for n, row in enumerate(rows)
    ]


LOOKING = LookingScenes(
    weights=WEIGHTS,
    reading=("transcribe/steps", "ocr/steps"),
    phrases=(*(p for p in DIGITS.phrases if p not in UNSAID), *LOOK_TOKENS),
    questions=DIGITS.questions,
    longer=DIGITS.longer,
    word_by_word=DIGITS.word_by_word,
    draw=DIGITS.draw,
    text=DIGITS.text,
    vocabulary=512,  # 70 of them say where a query looks
)

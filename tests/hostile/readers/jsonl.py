"""JSONL files of rows."""

from __future__ import annotations

from pathlib import Path
from random import Random

from megatron_mm.errors import DataError
from tests.hostile import rows
from tests.hostile.mutate import json_bytes

NAME = "rows as JSONL"
ALLOWED = (DataError,)
rows.builder()


def make(rng: Random, folder: Path) -> Path:
    """Writes a file of up to three rows."""
    rows.add_image(folder)
    path = folder / "rows.jsonl"
    lines = [json_bytes(rng, rows.changed(rng)) for _ in range(rng.randint(1, 3))]
    path.write_bytes(rng.choice((b"\n", b"\n\n", b"\r\n")).join(lines))
    return path


def read(value: Path) -> None:
    """Reads every row as training, packing and evaluation do."""
    rows.use(value)

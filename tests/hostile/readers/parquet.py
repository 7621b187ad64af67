"""Parquet files of rows."""

from __future__ import annotations

import io
import json
from datetime import date
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_mm.errors import DataError
from tests.hostile import rows
from tests.hostile.mutate import mutated_bytes, value

NAME = "rows as parquet"
ALLOWED = (DataError,)
ODD = (date(2026, 1, 1), Decimal("1.5"), b"\x89PNG", b"", {"bytes": b"x", "path": None}, [b"a"])
rows.builder()


def _column(rng: Random) -> Any:
    return rng.choice(ODD) if rng.random() < 0.5 else value(rng)


def make(rng: Random, folder: Path) -> Path:
    """Writes a table whose columns are a row's, changed, or the bytes of one with damage."""
    rows.add_image(folder)
    path = folder / "rows.parquet"
    row = rows.changed(rng) if rng.random() < 0.5 else dict(rng.choice(rows.ROWS))
    row = row if isinstance(row, dict) and row else {"messages": [row]}
    if rng.random() < 0.5:
        row[rng.choice([*row, "image", "images", "skill", "messages"])] = _column(rng)
    buffer = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist([row] * rng.randint(1, 3)), buffer)
    except (pa.ArrowException, ValueError, TypeError, OverflowError, UnicodeError):
        texts = {str(k): json.dumps(v, default=str) for k, v in row.items()}
        texts = {k.encode("utf-8", "replace").decode(): v for k, v in texts.items()}
        pq.write_table(pa.Table.from_pylist([texts]), buffer)
    data = buffer.getvalue()
    path.write_bytes(mutated_bytes(rng, data) if rng.random() < 0.5 else data)
    return path


def read(value: Path) -> None:
    """Reads every row as training, packing and evaluation do."""
    rows.use(value)

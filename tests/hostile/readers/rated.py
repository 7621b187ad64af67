"""Rated rows, as the commands that need no model read them."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from megatron_mm.errors import DataError
from megatron_mm.pass_rate.choose import keep, tiers
from megatron_mm.pass_rate.pairs import write_pairs
from tests.hostile.mutate import json_bytes, mutated_tree

NAME = "rated rows"
ALLOWED = (DataError,)
ROW: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "<image>Which?"},
        {"role": "assistant", "content": "a"},
    ],
    "images": [{"path": "i.png", "box": [0.0, 0.25, 0.5, 1]}],
    "accuracy": 0.5,
    "completions": ["a", "b", "<image>", "\n"],
    "finished": [True, True, False, True],
    "right": [True, False, None, True],
    "scores": {"exact": [1.0, 0.0, None, 1.0]},
}


def make(rng: Random, folder: Path) -> Path:
    """Writes a few rows with some of their values changed."""
    path = folder / "rated.jsonl"
    rows = [mutated_tree(rng, ROW) if rng.random() < 0.8 else ROW for _ in range(rng.randint(1, 3))]
    path.write_bytes(b"\n".join(json_bytes(rng, row) for row in rows))
    return path


def read(value: Path) -> None:
    """Chooses rows and makes pairs; what is written is whole or not there."""
    errors = []
    for name, call in (
        ("kept", lambda out: keep(value, out, 0.0, 1.0)),
        ("tier", lambda out: tiers(value, out, [0.5])),
        ("pairs", lambda out: write_pairs(value, out, 15, True, ["scores"])),
    ):
        try:
            call(value.with_name(f"{name}.jsonl"))
        except DataError as error:
            errors.append(error)
        assert not [*value.parent.glob("*.partial")]
    if errors:
        raise errors[0]

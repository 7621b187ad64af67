"""Skill maps."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from megatron_mm.earl.skill_map import FORMAT, load_skill_map, shuffled
from megatron_mm.errors import RLError
from tests.hostile.mutate import json_bytes, mutated_tree

NAME = "skill maps"
ALLOWED = (RLError,)
MAP: dict[str, Any] = {"format": FORMAT, "num_layers": 2, "num_experts": 4, "moe_router_topk": 2}
MAP |= {"skills": {"ocr": [[1, 3], [0]], "count": [[], [2]]}, "info": {"samples": 9}}


def make(rng: Random, folder: Path) -> Path:
    """Writes a map with some of its values changed."""
    path = folder / "map.json"
    path.write_bytes(json_bytes(rng, mutated_tree(rng, MAP)))
    return path


def read(value: Path) -> None:
    """Reads the map and uses it as training does."""
    found = load_skill_map(value, 2, 4, 2)
    assert found.membership().shape == (len(found.names), 2, 4)
    found.skill_ids([None, *found.names], "rows:1")
    shuffled(found, 1)

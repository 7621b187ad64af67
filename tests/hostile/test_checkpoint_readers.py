"""A short run of seeded damage over the readers of checkpoints and of foreign weights."""

from __future__ import annotations

import random
import time
from types import ModuleType

import pytest
from hostile.readers import blocks, index, run_json, safetensors

INPUTS = 400  # of each reader
SECONDS = 5  # for an input that takes a thousandth of one


@pytest.mark.parametrize(
    "reader", [blocks, index, run_json, safetensors], ids=lambda reader: reader.NAME
)
def test_damage_is_one_line_or_harmless(reader: ModuleType, tmp_path):
    lines = set()
    for seed in range(INPUTS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        made = reader.make(random.Random(seed), folder)
        begin = time.perf_counter()
        try:
            reader.read(made)
        except reader.ALLOWED as error:
            line = str(error)
            assert line.isprintable() and len(line) < 1500, f"seed {seed}: {line[:200]!r}"
            lines.add(line.replace(str(folder), ""))
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {error!r:.300}") from error
        assert time.perf_counter() - begin < SECONDS, f"seed {seed} took too long"
    assert len(lines) > 20, "the damage is always the same"

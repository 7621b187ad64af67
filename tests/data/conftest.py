"""A run that reads the digits, its tokenizer and rows of a test's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_mm.config.settings import DataPhase, RunConfig
from megatron_mm.data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(digits_folder) -> Tokenizer:
    return load_tokenizer(digits_folder / "tokenizer.model")


@pytest.fixture
def run(digits_folder) -> RunConfig:
    """8-pixel tiles of 2x2-pixel patches shuffled by 2: 16 patches, 4 stream tokens a tile."""
    run = RunConfig()
    run.model.language.vocab_size = 448
    run.model.vision.image_size, run.model.vision.patch_size = 8, 2
    run.data.max_num_tiles = 4
    run.data.seq_length = 128
    run.data.extra_columns = ["scene", "other_images"]
    run.data.train_data = [DataPhase(str(digits_folder / "mix.jsonl"))]
    run.training.micro_batch_size, run.training.global_batch_size = 2, 8
    return run


@pytest.fixture
def write_rows(tmp_path):
    """write_rows(row, ...) -> path of a JSONL file; a text is written as it is. wide.png
    (16x8 pixels, 1x2 tiles and a thumbnail) and small.png (8x8, one tile) lie beside it."""
    rng = np.random.default_rng(0)
    for name, shape in (("wide.png", (8, 16, 3)), ("small.png", (8, 8, 3))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / name)

    def write(*rows) -> Path:
        path = tmp_path / "rows.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def make_row(question="How many?", answer="3", images=(), **more) -> dict:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ],
        "images": list(images),
        **more,
    }


@pytest.fixture(name="make_row")
def make_row_fixture():
    return make_row

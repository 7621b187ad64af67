"""One small set of digit scenes for all tests of the training loop."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A folder with 6 images, 48 mixed questions about them and 24 held-out ones."""
    tool = Path(__file__).parents[2] / "tools" / "make_digits.py"
    spec = importlib.util.spec_from_file_location("make_digits_for_train", tool)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("scenes")
    counts = "--images 6 --valid-images 4 --align-per-image 1 --mix-per-image 8 --valid-per-key 2"
    module.main(f"--out {folder} --grid 3 {counts}".split())
    return folder


@pytest.fixture(scope="module")
def mixed_rows(tmp_path_factory, scenes):
    """Rows with one image, none, two and three, of odd and even lengths."""
    folder = tmp_path_factory.mktemp("mixed")
    lines = []
    for n, images in enumerate((1, 0, 2, 0, 3)):
        question = "?".join(["<image>"] * images) + "How many 3" + "?" * (1 + n % 2)
        row = {"messages": [{"role": "user", "content": question}]}
        row["images"] = [f"images/train_{i:06d}.png" for i in range(images)]
        lines.append(json.dumps(row))
    (folder / "images").symlink_to(scenes / "images")
    (folder / "mixed.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "mixed.jsonl"

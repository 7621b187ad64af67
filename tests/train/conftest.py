"""Rows of one, no and several images for tests of the training loop."""

from __future__ import annotations

import json

import pytest


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

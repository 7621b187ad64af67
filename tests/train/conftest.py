"""One small set of digit scenes for all tests of the training loop."""

from __future__ import annotations

import importlib.util
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

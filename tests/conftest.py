from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.digits.make_digits import main as make_digits
from megatron_mm import platform
from support.ranks import RankPool

platform.install()


@pytest.fixture(scope="session")
def ranks():
    """`ranks(n, function, *args)`: run a module-level function on n real gloo ranks."""
    pool = RankPool()
    yield pool.run
    pool.stop()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A folder with 6 images, 48 mixed questions about them and 24 held-out ones."""
    folder = tmp_path_factory.mktemp("scenes")
    counts = "--images 6 --valid-images 4 --align-per-image 1 --mix-per-image 8 --valid-per-key 2"
    make_digits(f"--out {folder} --grid 3 {counts}".split())
    return folder


@pytest.fixture
def job():
    """A job of one rank on the GPU."""
    from megatron_mm.config import ParallelConfig
    from megatron_mm.parallel import groups

    groups.start(ParallelConfig())
    yield groups.build(ParallelConfig())
    groups.stop()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device; this machine has none")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)

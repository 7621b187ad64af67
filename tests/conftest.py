from __future__ import annotations

import pytest
import torch
from ranks import RankPool

from megatron_mm import platform

platform.install()


@pytest.fixture(scope="session")
def ranks():
    """`ranks(n, function, *args)`: run a module-level function on n real gloo ranks."""
    pool = RankPool()
    yield pool.run
    pool.stop()


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

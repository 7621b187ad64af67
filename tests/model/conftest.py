"""One process is a whole job here: every test of the model runs on one rank."""

from __future__ import annotations

import pytest
import torch

from megatron_mm import platform

platform.install()


@pytest.fixture(scope="session")
def pg():
    """megatron-core's process groups of a job of one rank."""
    from megatron_mm.config import ParallelConfig
    from megatron_mm.parallel import groups

    torch.set_num_threads(1)
    groups.start(ParallelConfig())
    yield groups.build(ParallelConfig()).pg
    groups.stop()

"""One process is a whole job here: every test of the model runs on one rank."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode


@pytest.fixture(scope="module")
def one_rank():
    """The groups of a job of one rank; gone after the module, since other tests start jobs of
    their own."""
    from megatron_mm.config import ParallelConfig
    from megatron_mm.parallel import groups

    torch.set_num_threads(1)
    groups.start(ParallelConfig())
    yield groups.build(ParallelConfig())
    groups.stop()


@pytest.fixture(scope="module")
def pg(one_rank):
    """megatron-core's process groups of a job of one rank."""
    return one_rank.pg


@pytest.fixture(autouse=True)
def own_moe_state():
    """megatron-core keeps it for the process: metrics as long as the first model was deep, and a
    scale whose shape is another where no schedule runs the backward pass."""
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    yield
    destroy_moe_metrics_tracker()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None


@pytest.fixture(scope="module")
def new_letter():
    """The letter of support/new_letter.py. It goes when the module is done: other tests list the
    letters."""
    from megatron_mm.config.layers.kinds import LAYERS
    from support.new_letter import MLP

    parts = dict(LAYERS._parts)
    LAYERS.register("M", MLP)
    yield
    LAYERS._parts = parts


class Double(TorchFunctionMode):
    """Where either side asks for fp32, it gets fp64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return function(*args, **kwargs)


@pytest.fixture
def double():
    """Everything in fp64, so that a test tells a wrong formula from rounding."""
    torch.set_default_dtype(torch.float64)
    try:
        with Double():
            yield
    finally:
        torch.set_default_dtype(torch.float32)

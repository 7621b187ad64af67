"""A rank of a job that does not run: its groups, and its model of tensors without memory.

Any rank of any world size, on one processor. The groups are megatron-core's own over torch's
"fake" backend, whose collectives do nothing; tensors are on the device "meta", which has shapes
but no memory, and stands where the GPU would. Lengths and places, which a GPU run keeps on the
CPU too, are real.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_mm import platform
from megatron_mm.config import RunConfig
from megatron_mm.engine.engine import Engine
from megatron_mm.model.backends.interface import Backend
from megatron_mm.parallel.groups import Groups, lay_out, lay_out_encoder

META = torch.device("meta")


@contextmanager
def fake_job(
    run: RunConfig, rank: int, world_size: int, capability: tuple[int, int] | None = None
) -> Iterator[Groups]:
    """Inside, this process is `rank` of a job of `world_size`, and tensors are on "meta".

    Args:
        capability: compute capability of the GPUs that it plans for; None: CPUs.
    Raises:
        RuntimeError: this process is in a job already, or has a GPU (see `platform.hide_gpus`).
    """
    if dist.is_initialized():
        raise RuntimeError("a fake job cannot start inside a job; plan in a process of its own")
    with platform.standing_in(META, capability):
        hook = sys.excepthook  # torch puts "[rank0]:" before what it prints, once for every job
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        scale = MoEAuxLossAutoScaler.main_loss_backward_scale  # of the process, set by schedules
        try:
            pg = lay_out(run.parallel)
            # The two groups of ours decide things together and carry no tensors of the model.
            encoder = lay_out_encoder(run.parallel, pg)
            yield Groups(pg, replica=pg.pp, world=dist.group.WORLD, encoder=encoder)
        finally:
            MoEAuxLossAutoScaler.main_loss_backward_scale = scale
            sys.excepthook = hook
            destroy_moe_metrics_tracker()
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def fake_engine(run: RunConfig, groups: Groups, backend: Backend) -> Engine:
    """The trainer's engine on that rank: model, DDP's buffers, optimizer."""
    with META:
        return Engine.create(run, groups, backend)

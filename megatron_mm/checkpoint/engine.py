"""What a checkpoint needs to know of the thing it saves; `train.engine.Engine` is one."""

from __future__ import annotations

from typing import Protocol

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from megatron_mm.config import RunConfig
from megatron_mm.parallel.groups import Groups


class Engine(Protocol):
    run: RunConfig
    groups: Groups
    models: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    @property
    def chunks(self) -> list[nn.Module]:
        """The pipeline stages inside the data-parallel wrappers."""
        ...

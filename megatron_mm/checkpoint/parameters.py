"""What a checkpoint needs to know of the thing it saves; `train.engine.Engine` is one.

All that looks at the model itself is here: the rest of this room sees parameters only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from megatron_mm.config import RunConfig
from megatron_mm.parallel.groups import Groups
from megatron_mm.parallel.param_layout import ParamLayout, layouts


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


def parameters(engine: Engine) -> Iterator[tuple[str, torch.nn.Parameter, ParamLayout]]:
    """(global name, parameter, layout) of everything that this rank holds a part of."""
    return layouts(*engine.chunks)


def settle(engine: Engine) -> None:
    """With overlapped gathers a rank has new weights only where it owns them until the next
    forward pass: finish that now."""
    for model in engine.models:
        if model.ddp_config.overlap_param_gather:
            model.start_param_sync(force_sync=True)

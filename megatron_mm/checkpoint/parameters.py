"""Parameters of an engine with their layouts."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_mm.engine.engine import Engine
from megatron_mm.parallel.param_layout import ParamLayout, layouts


def parameters(engine: Engine) -> Iterator[tuple[str, torch.nn.Parameter, ParamLayout]]:
    """Yields (global name, parameter, layout) of every parameter that this rank holds a part of."""
    return layouts(*engine.chunks)


def finish_param_gather(engine: Engine) -> None:
    """Finishes an overlapped gather of parameters. Without it a rank has new weights only in the
    ranges it owns, until the next forward pass."""
    for model in engine.models:
        if model.ddp_config.overlap_param_gather:
            model.start_param_sync(force_sync=True)

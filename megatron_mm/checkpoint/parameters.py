"""Parameters of an engine with their layouts, and the ranks that share them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_mm.engine.engine import Engine
from megatron_mm.parallel.param_layout import ParamLayout, layouts

Entry = tuple[str, torch.nn.Parameter, ParamLayout]


def parameters(engine: Engine) -> Iterator[Entry]:
    """Yields (global name, parameter, layout) of every parameter that this rank holds a part of."""
    return layouts(*engine.modules)


@dataclass(frozen=True)
class Family:
    """Parameters that the same ranks share.

    Attributes:
        across: ranks that hold other parts of the tensors, or copies of the same part.
        data: data-parallel ranks, which hold the same part.
    """

    entries: list[Entry]
    across: dist.ProcessGroup
    data: dist.ProcessGroup


def families(engine: Engine) -> list[Family]:
    """Returns the parameters that every stage has, the experts, and, beside a pipeline, the
    encoder. Empty families are left out; ranks of one stage have the same."""
    pg, held = engine.groups.pg, [*layouts(*engine.chunks)]
    found = [
        Family([entry for entry in held if not entry[2].expert], pg.tp, pg.dp_cp),
        Family([entry for entry in held if entry[2].expert], pg.tp_ep, pg.expt_dp),
    ]
    if engine.encoder is not None:
        beside = engine.encoder.pg
        found.append(Family([*layouts(engine.encoder.module)], beside.tp, beside.dp_cp))
    return [family for family in found if family.entries]


def finish_param_gather(engine: Engine) -> None:
    """Finishes an overlapped gather of parameters. Without it a rank has new weights only in the
    ranges it owns, until the next forward pass."""
    for model in engine.models:
        if model.ddp_config.overlap_param_gather:
            model.start_param_sync(force_sync=True)


@torch.no_grad()
def begin_copies(engine: Engine, new: Collection[str]) -> None:
    """Copies into new parameters what they start as a copy of, once everything else is loaded. Both
    are of one layer, so on the same ranks."""
    held = {name: (param, layout) for name, param, layout in parameters(engine)}
    for name in new:
        param, layout = held[name]
        source = layout.source(name)
        if source is not None:
            param.data.copy_(held[source][0].data)

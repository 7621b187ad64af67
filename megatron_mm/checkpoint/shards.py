"""Shards of whole tensors that this rank holds, and the choice of the copy that is written."""

from __future__ import annotations

from collections.abc import Set

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_mm.checkpoint.compatible import MOVING_PREFIX
from megatron_mm.checkpoint.optimizer_state import MOMENTS, owned, trainable
from megatron_mm.checkpoint.parameters import families, parameters
from megatron_mm.engine.engine import Engine
from megatron_mm.errors import CheckpointError
from megatron_mm.parallel.param_layout import ParamLayout

Shapes = dict[str, tuple[int, ...]]


def weight_key(name: str) -> str:
    return f"model.{name}"


def state_key(kind: str, name: str) -> str:
    return f"optimizer.{kind}.{name}"


def moving_key(which: str, name: str) -> str:
    return f"{MOVING_PREFIX}{which}.{name}"


def kinds_saved(dtype: torch.dtype) -> tuple[str, ...]:
    """Kinds of optimizer state on disk of a parameter of this type. An fp32 parameter is its own
    main parameter, so "master" is left out."""
    return MOMENTS if dtype == torch.float32 else ("master", *MOMENTS)


def to_shard(
    key: str, layout: ParamLayout, data: torch.Tensor, replica: tuple[int, ...] = (0,)
) -> ShardedTensor:
    """Describes `data`, shaped like the parameter, as a shard of the whole tensor.

    Together with its inverse `from_shard` the one place that knows how a parameter lies in its
    shard.
    """
    data = layout.held(data.detach().contiguous())
    return ShardedTensor(
        key,
        data,
        data.dtype,
        layout.held_shape,
        layout.global_shape,
        layout.offset,
        None,  # shards need not form a regular grid
        replica,
    )


def from_shard(
    data: torch.Tensor | None,
    layout: ParamLayout,
    like: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Inverse of `to_shard`: returns the loaded data (None: only padding) shaped like the
    parameter, in fp32 on the CPU, or in `dtype`."""
    whole = torch.zeros(like.shape, dtype=dtype)
    if data is not None:
        layout.held(whole).copy_(data)
    return whole


def is_padding(layout: ParamLayout) -> bool:
    """Whether the whole shard is padding, which no checkpoint holds."""
    return 0 in layout.held_shape


def replicas(engine: Engine) -> dict[str, tuple[int, int]]:
    """Returns name -> (copy number among model-parallel ranks, among data-parallel ranks).

    Copy (0, 0) is written. Data-parallel ranks take turns, parameter by parameter, to share the
    writing. Collective over the tensor- and expert-parallel groups.
    """
    result: dict[str, tuple[int, int]] = {}
    for family in families(engine):
        across, data = family.across, family.data
        offsets = {name: layout.offset for name, _, layout in family.entries}
        held: list[dict] = [offsets]
        if across.size() > 1:
            held = [{}] * across.size()
            dist.all_gather_object(held, offsets, group=across)
        before = held[: across.rank()]
        for turn, (name, offset) in enumerate(offsets.items()):
            copy = sum(other[name] == offset for other in before)
            result[name] = copy, (data.rank() - turn) % data.size()
    return result


def expected_shapes(engine: Engine, *, weights_alone: bool) -> Shapes:
    """Returns the whole shape of every tensor in a checkpoint of this model. Collective over the
    pipeline-parallel group; ranks of one stage have the same names and whole shapes.

    Args:
        weights_alone: leave out the optimizer's state and the sets that move.
    """
    mine: Shapes = {}
    for name, param, layout in parameters(engine):
        mine[weight_key(name)] = layout.global_shape
        if weights_alone:
            continue
        for kind in kinds_saved(param.dtype) if param.requires_grad else ():
            mine[state_key(kind, name)] = layout.global_shape
        for which, moving in engine.moving.items():
            if name in moving.names:
                mine[moving_key(which, name)] = layout.global_shape
    pp = engine.groups.pg.pp
    parts: list[Shapes] = [mine]
    if pp.size() > 1:
        parts = [{}] * pp.size()
        dist.all_gather_object(parts, mine, group=pp)
    return {key: tuple(shape) for part in parts for key, shape in part.items()}


def empty_shards(
    engine: Engine, stored: set[str], *, weights_alone: bool
) -> dict[str, ShardedTensor]:
    """Allocates CPU buffers for the shards this rank needs, of the tensors in `stored`.

    Args:
        weights_alone: see `expected_shapes`.
    """
    wanted: dict[str, ShardedTensor] = {}

    def want(key: str, layout: ParamLayout, param: torch.Tensor, dtype: torch.dtype) -> None:
        if not is_padding(layout):
            wanted[key] = to_shard(key, layout, torch.empty(param.shape, dtype=dtype))

    for name, param, layout in parameters(engine):
        if weight_key(name) in stored:
            want(weight_key(name), layout, param, param.dtype)
    if weights_alone:
        return wanted
    mine = owned(engine)  # other ranks load the state of the other parameters
    for name, param, layout in trainable(engine):
        for kind in kinds_saved(param.dtype) if name in mine else ():
            want(state_key(kind, name), layout, param, torch.float32)
    for which, moving in engine.moving.items():
        for name, param, layout in parameters(engine):
            if name in moving.names:
                want(moving_key(which, name), layout, param, moving.dtype or param.dtype)
    return wanted


def check_complete(engine: Engine, wanted: Set[str], added: Set[str]) -> None:
    """Checks that every parameter is either read or drawn anew.

    Args:
        wanted: keys of what is read; added: keys of what is drawn.

    Raises:
        CheckpointError: one would keep what it happens to hold.
    """
    for name, _, layout in parameters(engine):
        key = weight_key(name)
        if (key in wanted) + (key in added) != 1 and not is_padding(layout):
            raise CheckpointError(f"nothing fills {name}: it is neither stored nor new")

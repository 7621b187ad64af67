"""Optimizer state in model space: tensors shaped like the parameter they belong to.

The distributed optimizer splits a flat buffer at places that ignore parameter boundaries, so its
own state fits one layout only. Here the moments of a parameter are gathered over the ranks that
share it, and cut again to the range a rank owns when they are restored. They have the shapes of
the weights and re-shard like them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from megatron_mm.checkpoint.parameters import families, parameters
from megatron_mm.engine.engine import Engine
from megatron_mm.parallel.param_layout import ParamLayout

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("master", *MOMENTS)
State = dict[str, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Owned:
    """Elements [start, stop) of a flattened parameter that this rank updates.

    Attributes:
        main: fp32 main parameter that the inner optimizer steps, flat or parameter-shaped.
        group: the inner optimizer's parameter group that `main` is in.
    """

    start: int
    stop: int
    main: torch.Tensor
    inner: torch.optim.Optimizer
    group: dict

    def tensor(self, kind: str) -> torch.Tensor:
        """fp32 [stop - start]. Moments are zero before the first step, as in Adam."""
        if kind == "master":
            return self.main.detach().reshape(-1)
        state = self.inner.state.get(self.main, {})
        return state[kind].reshape(-1) if kind in state else torch.zeros_like(self.tensor("master"))

    @property
    def step(self) -> int:
        """Adam's step count: per parameter in torch, per group in apex and Transformer Engine."""
        own = self.inner.state.get(self.main, {}).get("step")
        return int(own if own is not None else self.group.get("step", 0))

    def set(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        """Overwrites main parameter, moments and step from parameter-shaped tensors."""
        mine = {k: tensors[k].reshape(-1)[self.start : self.stop] for k in KINDS if k in tensors}
        if "master" in mine:
            self.main.detach().view(-1).copy_(mine["master"])
        state = self.inner.state[self.main]
        for kind in MOMENTS:
            moment = torch.empty_like(self.main, requires_grad=False)
            moment.view(-1).copy_(mine[kind])
            state[kind] = moment
        if isinstance(self.inner, (torch.optim.Adam, torch.optim.AdamW)):
            # One tensor per parameter, because Adam increments it in place. Upstream shares one
            # among all parameters (distrib_optimizer.py:1032) and so counts too fast.
            on_device = self.group.get("capturable") or self.group.get("fused")
            device = self.main.device if on_device else torch.device("cpu")
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
        else:
            self.group["step"] = step


def _leaves(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    if isinstance(optimizer, ChainedOptimizer):
        for part in optimizer.chained_optimizers:
            yield from _leaves(part)
    elif not getattr(optimizer, "is_stub_optimizer", False):  # a stage with nothing to train
        yield optimizer


def _pairs(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (model parameter, main parameter that the inner optimizer steps).

    Not read from `model_param_group_index_map` (distrib_optimizer.py:773), whose order is wrong
    where one parameter group mixes bf16 and fp32: line 484 puts the fp32 shards first.
    """
    if isinstance(optimizer, DistributedOptimizer):  # attributes of distrib_optimizer.py:780
        sides: tuple[tuple[Any, Any], ...] = (
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
            (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
        )
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):  # optimizer.py:993
        same = optimizer.fp32_from_fp32_groups
        sides = ((same, same), (optimizer.float16_groups, optimizer.fp32_from_float16_groups))
    else:  # FP32Optimizer steps the model's own parameters
        groups = [group["params"] for group in optimizer.param_groups]
        sides = ((groups, groups),)
    for model_groups, main_groups in sides:
        for params, mains in zip(model_groups, main_groups, strict=True):
            yield from zip(params, mains, strict=True)


def _owned(engine: Engine) -> tuple[dict[torch.Tensor, Owned], bool]:
    """Returns (the range this rank updates of each parameter, whether parameters are split over
    replicas)."""
    owned, split = {}, False
    for optimizer in _leaves(engine.optimizer):
        inner = optimizer.optimizer
        group_of = {main: group for group in inner.param_groups for main in group["params"]}
        for param, main in _pairs(optimizer):
            start, stop = 0, param.numel()
            if isinstance(optimizer, DistributedOptimizer):
                # The only record of the split (distrib_optimizer.py:793).
                range_ = optimizer._get_model_param_range_map(param)["param"]
                start, stop, split = range_.start, range_.end, True
            owned[param] = Owned(start, stop, main, inner, group_of[main])
    return owned, split


def trainable(engine: Engine) -> Iterator[tuple[str, torch.nn.Parameter, ParamLayout]]:
    """Yields (global name, parameter, layout) of the trainable parameters."""
    return (entry for entry in parameters(engine) if entry[1].requires_grad)


def owned(engine: Engine) -> dict[str, Owned]:
    """Ranges that this rank updates, by parameter name, in the model's order."""
    by_param, _ = _owned(engine)
    return {name: by_param[param] for name, param, _ in trainable(engine) if param in by_param}


@torch.no_grad()
def collect(
    engine: Engine,
    keep: Callable[[str, str], bool] = lambda kind, name: True,
    chunk: int = 1 << 26,
) -> State:
    """Gathers the state of every trainable parameter of this stage. Every rank calls it.

    Args:
        keep: (kind, name) -> whether this rank keeps that tensor.
        chunk: elements gathered at a time.

    Returns:
        name -> {"master", "exp_avg", "exp_avg_sq": fp32, of the parameter's local shape,
        on the CPU; "step": int64 scalar}. Frozen parameters have no entry.
    """
    by_param, split = _owned(engine)
    # A rank that owns nothing still takes part in the gather of those that do.
    split = split or engine.run.parallel.use_distributed_optimizer
    state: State = {}
    for family in families(engine):
        group = family.data
        members = [(name, param) for name, param, _ in family.entries if param.requires_grad]
        if not members:
            continue
        shared = group if split and group.size() > 1 else None
        steps = torch.tensor(
            [by_param[p].step if p in by_param else 0 for _, p in members],
            device=members[0][1].device,
        )
        if shared:
            dist.all_reduce(steps, op=dist.ReduceOp.MAX, group=shared)
        for (name, _), step in zip(members, steps.cpu(), strict=True):
            state[name] = {"step": step}
        for part in _chunks(members, chunk):
            for kind in KINDS:
                for name, tensor in _gather(part, kind, by_param, shared):
                    if keep(kind, name):
                        # Copy even on the CPU: a view would keep the whole chunk alive.
                        state[name][kind] = tensor.to("cpu", copy=True)
    return {name: state[name] for name, _, _ in trainable(engine)}


def _chunks(members: list, limit: int) -> Iterator[list]:
    part: list = []
    size = 0
    for name, param in members:
        if part and size + param.numel() > limit:
            yield part
            part, size = [], 0
        part.append((name, param))
        size += param.numel()
    yield part


def _gather(members: list, kind: str, by_param: dict, group) -> Iterator[tuple[str, torch.Tensor]]:
    sizes = [param.numel() for _, param in members]
    flat = torch.zeros(sum(sizes), dtype=torch.float32, device=members[0][1].device)
    whole = flat.split(sizes)
    for (_, param), target in zip(members, whole, strict=True):
        if param in by_param:
            mine = by_param[param]
            target[mine.start : mine.stop] = mine.tensor(kind)
    if group is not None:
        # Every element has one owner and is zero elsewhere. Summed as integers it keeps every
        # bit; a float sum would turn -0 into 0.
        dist.all_reduce(flat.view(torch.int32), group=group)
    for (name, param), tensor in zip(members, whole, strict=True):
        yield name, tensor.view(param.shape)


@torch.no_grad()
def restore(engine: Engine, state: State) -> None:
    """Writes the ranges that this rank owns from a state as `collect` returns it.

    A tensor may have any shape with the parameter's number of elements. "master" may be absent
    where the parameter itself is fp32 and already loaded.

    Raises:
        KeyError: a parameter has no entry.
    """
    for name, mine in owned(engine).items():
        entry = state[name]
        mine.set(entry, int(entry["step"]))

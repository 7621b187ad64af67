"""Place of each parameter's local block in the whole tensor.

Initialisation draws the whole tensor and keeps the local block, checkpoints save the block at its
offset, and tests and tools gather blocks into the whole. All use the same `ParamLayout`, so a
parameter that is split wrongly fails the layout-invariance test. A run that loads its weights draws
only what they lack.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

# Fills a whole tensor (or one slice of it along dim 0) from a generator.
Initializer = Callable[[torch.Tensor, torch.Generator], object]


@dataclass(frozen=True)
class ParamLayout:
    """The local parameter, viewed as `local_shape`, is the block at `offset` of `global_shape`.

    The view may have more dimensions than the parameter: gate and up of a GLU form a dimension of
    their own, so that each is split over ranks by itself. Where the block exceeds the whole tensor,
    the parameter is padded (25 heads on 2 ranks). Padding is zero, stays zero, and is in no
    checkpoint.
    """

    global_shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    offset: tuple[int, ...]
    init: Initializer
    rows_drawn_alone: bool = False  # draw one index of dim 0 at a time (experts)
    split: tuple[int, ...] = ()  # dimensions of the view that are split over ranks
    expert: bool = False  # replicated over the expert-data-parallel group, not over data-parallel
    # (end of its name, end of another's): it starts as a copy of that parameter of the same layer.
    copies: tuple[str, str] | None = None
    set_by_run: bool = False  # it never learns, but changes as training goes on

    def source(self, name: str) -> str | None:
        """Returns the name of the parameter that a new one of this name starts as a copy of."""
        if self.copies is None:
            return None
        own, other = self.copies
        assert name.endswith(own), f"{name} does not end with {own}"
        return name.removesuffix(own) + other

    @property
    def held_shape(self) -> tuple[int, ...]:
        """Local shape without padding; has a 0 where a rank holds only padding."""
        sizes = zip(self.local_shape, self.offset, self.global_shape, strict=True)
        return tuple(max(0, min(n, whole - o)) for n, o, whole in sizes)

    @property
    def block(self) -> tuple[slice, ...]:
        """Slices of the whole tensor that this rank holds."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.held_shape, strict=True))

    def held(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a view of shape `held_shape` of a tensor of the parameter's size."""
        return tensor.view(self.local_shape)[tuple(slice(n) for n in self.held_shape)]


def normal(std: float) -> Initializer:
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


def constant(value: float) -> Initializer:
    return lambda tensor, generator: tensor.fill_(value)


def uniform(low: float, high: float, then: Callable | None = None) -> Initializer:
    def fill(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor.uniform_(low, high, generator=generator)
        if then is not None:
            tensor.copy_(then(tensor))

    return fill


def place(
    param: torch.nn.Parameter,
    init: Initializer,
    *,
    split: dict[int, ProcessGroup] | None = None,
    view: tuple[int, ...] | None = None,
    whole: dict[int, int] | None = None,
    rows_drawn_alone: bool = False,
    partial_gradient: bool = False,
    expert: bool = False,
    copies: tuple[str, str] | None = None,
    set_by_run: bool = False,
) -> None:
    """Attaches a layout to a parameter.

    Args:
        split: view dimension -> process group whose ranks hold equal consecutive blocks of it.
        view: local shape of the view; default: the parameter's shape.
        whole: dimension -> whole size, where it is smaller than the ranks' blocks together.
        rows_drawn_alone: see `ParamLayout`.
        partial_gradient: the parameter is replicated over tensor-parallel ranks that each see
            other positions or heads, so its gradient must be summed over them
            (docs/design.md 4.3).
        expert, copies, set_by_run: see `ParamLayout`.

    Raises:
        ValueError: the view has another number of elements than the parameter.
    """
    local = tuple(view or param.shape)
    if math.prod(local) != param.numel():
        raise ValueError(f"view {local} does not hold the {param.numel()} elements of a parameter")
    sizes, offset = list(local), [0] * len(local)
    for dim, group in (split or {}).items():
        sizes[dim] = local[dim] * group.size()
        offset[dim] = local[dim] * group.rank()
    for dim, size in (whole or {}).items():
        sizes[dim] = size
    shared = tuple(dim for dim, group in (split or {}).items() if group.size() > 1)
    param.param_layout = ParamLayout(
        tuple(sizes),
        local,
        tuple(offset),
        init,
        rows_drawn_alone,
        shared,
        expert,
        copies,
        set_by_run,
    )
    # Attributes that megatron-core's gradient reduction and clipping read.
    param.sequence_parallel = partial_gradient
    if split:
        param.tensor_model_parallel = True
        param.partition_dim = min(split)
        param.partition_stride = 1
    if expert:
        param.allreduce = False
        param.tensor_model_parallel = True


def layouts(*models: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter, ParamLayout]]:
    """Yields (global name, parameter, layout) of every parameter of pipeline stages. Names contain
    global layer numbers.

    Raises:
        ValueError: a parameter has no layout.
    """
    for model in models:
        for name, param in model.named_parameters():
            name = name.removeprefix("module.")
            layout = getattr(param, "param_layout", None)
            if layout is None:
                raise ValueError(f"parameter {name} has no layout: call place() where it is made")
            yield name, param, layout


def _generator(seed: int, name: str, row: int = 0) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initialize(model: torch.nn.Module, seed: int) -> None:
    """Initialises every parameter; see `initialize_one`."""
    for name, param, layout in layouts(model):
        initialize_one(name, param, layout, seed)


@torch.no_grad()
def initialize_one(name: str, param: torch.Tensor, layout: ParamLayout, seed: int) -> None:
    """Initialises a parameter from (seed, global name). The whole tensor is drawn in fp32 on the
    CPU and then sliced, so a seed gives the same model on any layout."""
    param.data.zero_()
    target = layout.held(param.data)
    if layout.rows_drawn_alone:
        for i in range(layout.held_shape[0]):
            whole = draw(layout, name, seed, layout.offset[0] + i)
            target[i].copy_(whole[layout.block[1:]])
    else:
        target.copy_(draw(layout, name, seed)[layout.block])


@torch.no_grad()
def leave_open(model: torch.nn.Module, device: torch.device) -> None:
    """Moves every parameter to the device and draws none: it is NaN until it is loaded, so that
    nothing can be trained or answered with one that was forgotten. Padding is zero."""
    for _, param, layout in layouts(model):
        param.data = torch.zeros_like(param.data, device=device)
        layout.held(param.data).fill_(math.nan)


def draw(layout: ParamLayout, name: str, seed: int, row: int = 0) -> torch.Tensor:
    """Draws the initial whole tensor of a parameter, in fp32 on the CPU; only its `row` if rows are
    drawn alone (experts). A copy of another parameter is drawn as that one is."""
    name = layout.source(name) or name
    shape = layout.global_shape[1:] if layout.rows_drawn_alone else layout.global_shape
    whole = torch.empty(shape, dtype=torch.float32)
    layout.init(whole, _generator(seed, name, row))
    return whole

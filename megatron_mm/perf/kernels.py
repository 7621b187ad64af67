"""Kernels: what one operation of torch costs a device, and the host that launches it.

Counted for the kernels of a GPU, whatever the tensors are on: a view costs nothing, every other
operation is one launch that reads what it is given and writes what it makes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.attention.varlen  # registers its operators
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten

_ALLOCATE: tuple[Any, ...] = (aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided)
_ALLOCATE += (aten.new_empty_strided,)
_CHANGE_SHAPES = (aten.set_, aten.resize_, aten.as_strided_, aten.record_stream)
# They write over their first argument without reading it.
_OVERWRITE = (aten.copy_, aten.fill_, aten.zero_)
# Of their first argument they read rows, as many as they return; or write as many as are given.
_PICK = (aten.embedding, aten.index_select, aten.index, aten._unsafe_index, aten.gather)
_PUT = (aten.index_put_, aten.index_copy_, aten.index_add_, aten.scatter_, aten.scatter_add_)
# Their result, or its shape, is read by the host.
_WAIT: tuple[Any, ...] = (
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
)
_WAIT += (aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount)
_INDEX = (aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class Link(NamedTuple):
    """Ranks that talk: a collective, and the role of its group."""

    kind: str
    group: str


class Kernel(NamedTuple):
    """One operation that the host launches on the device, or a wait of the host for it.

    Attributes:
        flops: of a matrix product or attention.
        moved: bytes read and written.
        link: for a collective; `moved` are then the bytes that this rank gives.
        launched: False for a wait alone.
        waits: the host goes on only when the device is done with it.
        again: those of the FLOPs that the forward pass has done before.
        fp32: of a product, whether it is computed in fp32, or in fp64.
    """

    flops: int = 0
    moved: int = 0
    link: Link | None = None
    launched: bool = True
    waits: bool = False
    again: int = 0
    fp32: bool = False


@dataclass
class Work:
    """Work that was done: computed and sent.

    Attributes:
        flops: of matrix products and attention, as torch.utils.flop_counter counts them.
        moved: bytes read and written by every other operation that is no view.
        launches: operations that are no view: kernels, at least.
        waits: operations for whose result the host waits.
        sent: bytes that this rank gave to each kind of collective.
        again: those of the FLOPs that the forward pass had done before.
        fp32: those of the FLOPs that are of products in fp32.
    """

    flops: int = 0
    moved: int = 0
    launches: int = 0
    waits: int = 0
    sent: Counter[Link] = field(default_factory=Counter)
    again: int = 0
    fp32: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.moved + other.moved,
            self.launches + other.launches,
            self.waits + other.waits,
            self.sent + other.sent,
            self.again + other.again,
            self.fp32 + other.fp32,
        )

    def times(self, share: float) -> Work:
        """Returns a share of this work, in whole numbers."""
        return Work(
            round(share * self.flops),
            round(share * self.moved),
            round(share * self.launches),
            round(share * self.waits),
            Counter({link: round(share * size) for link, size in self.sent.items()}),
            round(share * self.again),
            round(share * self.fp32),
        )

    @classmethod
    def of(cls, kernels: Iterable[Kernel]) -> Work:
        """The sums over these."""
        made = cls()
        for kernel in kernels:
            if kernel.link is not None:
                made.sent[kernel.link] += kernel.moved
            elif kernel.flops:
                made.flops += kernel.flops
                made.again += kernel.again
                made.fp32 += kernel.flops if kernel.fp32 else 0
            else:
                made.moved += kernel.moved
            made.launches += kernel.launched
            made.waits += kernel.waits
        return made


def _attention(query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_flop_count(query.shape, _heads_of(query, key), _heads_of(query, value))


def _attention_backward(grad, query, key, value, *args, out_val=None, **kwargs) -> int:
    shapes = query.shape, _heads_of(query, key), _heads_of(query, value)
    return sdpa_backward_flop_count(grad.shape, *shapes)


def _heads_of(query: torch.Tensor, shared: torch.Tensor) -> tuple[int, ...]:
    """Grouped keys and values are multiplied once for each query head."""
    return (shared.shape[0], query.shape[1], *shared.shape[2:])


def _grouped(first, second, *args, out_val=None, **kwargs) -> int:
    """Every row once, whichever of its matrices it meets; [M, R] by [R, N] are weight gradients."""
    if first.dim() == 2 or second.dim() == 3:
        return 2 * first.numel() * second.shape[-1]
    return 2 * first.shape[1] * first.shape[2] * second.shape[1]


def _packed(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *args, **kwargs) -> int:
    """Counts as many keys for every sample as the longest has: lengths are on the device."""
    return sdpa_flop_count(*_shapes(query, max_k))


def _packed_backward(grad, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, *a, **k) -> int:
    shapes = _shapes(query, max_k)
    return sdpa_backward_flop_count(shapes[0], *shapes)


def _scores(grad, query, key, *args, **kwargs) -> int:
    return 2 * query.numel() * key.shape[2]


def _packed_scores(grad, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, *a, **k) -> int:
    return 2 * query.numel() * max_k


def _shapes(query_ThD: torch.Tensor, keys: int) -> tuple[tuple[int, ...], ...]:
    tokens, heads, width = query_ThD.shape
    held = (1, heads, keys, width)
    return (1, heads, tokens, width), held, held


# Kernels that torch's table lacks: the CPU's attention, by the formulas of the GPU's, that of
# packed streams, and grouped products. The formulas take tensors, not shapes.
MORE_FLOPS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._grouped_mm: _grouped,
    torch.ops.torch_attn._varlen_attn: _packed,
    torch.ops.torch_attn._varlen_attn_backward: _packed_backward,
}
# The backward passes of attention begin with a product of the forward pass: the scores.
_SCORES: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _scores,
    torch.ops.torch_attn._varlen_attn_backward: _packed_scores,
}


def kernel_of(
    func: Any, args: tuple, kwargs: dict, out: Any, made: list[torch.Tensor], device: str
) -> Kernel | None:
    """Returns the kernel that an operation is, None for a view or work of the host.

    Args:
        made: the tensors of `out` with storage of their own.
        device: type of the device: nothing else counts.
    """
    packet = func._overloadpacket
    here = any(t.device.type == device for t in tensors((args, kwargs.values(), out)))
    if not here:
        return None
    waits = device != "cpu" and _waits(packet, args, kwargs, device)
    flops = 0
    if packet in flop_registry:
        flops = flop_registry[packet](*args, **kwargs, out_val=out)
    elif packet in MORE_FLOPS:
        flops = MORE_FLOPS[packet](*args, **kwargs, out_val=out)
    elif packet in (*_ALLOCATE, *_CHANGE_SHAPES) or not (made or func._schema.is_mutable or waits):
        return None
    moved, first = _traffic(func, args, kwargs, made), next(iter(tensors(args)), None)
    fp32 = bool(flops) and first is not None and first.dtype in (torch.float32, torch.float64)
    again = _SCORES[packet](*args, **kwargs) if packet in _SCORES else 0
    return Kernel(flops, moved, waits=waits, again=again, fp32=fp32)


def _traffic(func: Any, args: tuple, kwargs: dict, made: list[torch.Tensor]) -> int:
    """Bytes that are read and written."""
    packet, total = func._overloadpacket, sum(map(size, made))
    given = list(_arguments(func, args, kwargs))
    most = None  # bytes that can matter of the first argument
    if packet in _PICK:
        most = total
    elif packet in _PUT:
        most = size(next(t for _, _, held in reversed(given) for t in reversed(held)))
    for number, (written, only_written, held) in enumerate(given):
        each = sum(map(size, held))
        if number == 0 and most is not None:
            each = min(each, most)
        total += each * (written + (not only_written))
    return total


def _arguments(
    func: Any, args: tuple, kwargs: dict
) -> Iterator[tuple[bool, bool, list[torch.Tensor]]]:
    """Yields for every argument with tensors: whether it is written, whether it is written without
    being read, and the tensors."""
    for number, argument in enumerate(func._schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        only = written and (argument.kwarg_only or func._overloadpacket in _OVERWRITE)
        if held := list(tensors(value)):
            yield written, only, held


def _waits(packet: Any, args: tuple, kwargs: dict, device: str) -> bool:
    """Whether the host goes on only when the device is done."""
    if packet in _WAIT:
        return True
    if packet is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    if packet is aten._to_copy:
        target = kwargs.get("device") or args[0].device
        return _crosses(args[0].device, target) and not kwargs.get("non_blocking", False)
    if packet is aten.copy_:
        blocks = not kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        return _crosses(args[1].device, args[0].device) and blocks
    if packet in _INDEX:
        indices = [index for index in args[1] if index is not None]
        filled = len(args) > 2 and args[2].numel() == 1  # a masked_fill
        masked = any(index.dtype == torch.bool for index in indices) and not filled
        return masked or any(index.device.type != device for index in indices)
    return False


def _crosses(source: torch.device, target: torch.device) -> bool:
    return (source.type == "cpu") != (target.type == "cpu")


def tensors(tree: Any) -> Iterable[torch.Tensor]:
    """All tensors in nested lists, tuples and values of dictionaries."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple, type({}.values()))):
        for branch in tree:
            yield from tensors(branch)


def size(tensor: torch.Tensor) -> int:
    """Bytes that a kernel meets: of an expanded tensor those that are there."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())

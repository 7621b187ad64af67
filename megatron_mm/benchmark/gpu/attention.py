"""Attention over packed samples, that of looks, and what a new length costs.

cuDNN plans anew for every shape, and the lengths of microbatches change all the time. Runs switch
it off (`engine/kernels.py`) and take packed streams to a kernel that plans nothing; this check says
whether both are right on the card.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from megatron_mm.benchmark.gpu.comparing import both_ways, difference
from megatron_mm.benchmark.gpu.visit import Row, Visit
from megatron_mm.model.layers import varlen
from megatron_mm.model.layers.attention import causal_attention, rectangle_attention
from megatron_mm.model.layers.clvr import memory_attention
from megatron_mm.model.memory_map import MemoryMap
from megatron_mm.model.segments import Segments

NAMES = ("output", "d query", "d key", "d value")
# Both in bf16: probabilities and results are rounded by 2^-9 on average, in other blocks.
BF16 = 0.02
# torch's words where the kernels that are allowed do not take the tensors.
NO_KERNEL = ("No available kernel", "No viable backend")
Call = Callable[[], list[torch.Tensor]]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@contextmanager
def cudnn(used: bool) -> Iterator[None]:
    """Allows torch cuDNN's attention alone, or all others. Where others are allowed beside it,
    torch prefers them."""
    if used:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            yield
        return
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def check(visit: Visit, row: Row) -> None:
    """Compares, and times the first and the second call of several shapes each way."""
    _check_packed(visit, row)
    lengths = visit.size([8192, 7936, 7424, 6912, 6400, 5888], [72, 64])
    counts = visit.size([26, 25, 23, 21, 19, 17], [3, 2])
    packed = _new_shapes(row, "packed text", _text(visit, causal_attention), lengths)
    for kind, make, sizes in (
        ("text", _text(visit, rectangle_attention), lengths),
        ("tiles", _tiles(visit), counts),
    ):
        with cudnn(False):
            usual = _new_shapes(row, f"{kind}, cuDNN off", make, sizes)
        others = [packed] if kind == "text" else []
        with cudnn(True):
            name = f"{kind}, cuDNN on"
            refused = refusal(make(sizes[0] + 1))
            if refused is None:
                others.append(_new_shapes(row, name, make, sizes))
            else:
                row.note({f"{name}: refused": refused})
                row.text.append(f"{name}: refused")
        apart = [difference(a, b) for other in others for a, b in zip(other, usual, strict=True)]
        if apart:
            row.at_most(f"{kind}: ways apart", max(apart), BF16)


def _sizes(visit: Visit) -> tuple[int, int, int]:
    """Query heads, key heads, features of a head: mm-80b's."""
    return visit.size((16, 2, 256), (4, 2, 16))


def _check_packed(visit: Visit, row: Row) -> None:
    """Attention over packed samples: among themselves, and to the patches of images. Of these some
    belong to samples that have no position in a round, some to nobody."""
    cuts = torch.tensor(visit.size([0, 700, 701, 1500, 2048], [0, 30, 31, 70, 80]))
    heads, groups, width = _sizes(visit)
    total = int(cuts[-1])

    def among(device: torch.device | str) -> Attention:
        segments = Segments.from_cu_seqlens(cuts, device)
        return lambda query, key, value: causal_attention(query, key, value, segments)

    _compare(visit, row, "packed", [(total, n, width) for n in (heads, groups, groups)], among)

    ends, patches = cuts[[1, 3, 3, 4]], visit.size([256, 512, 300, 64], [8, 16, 9, 2])
    since = cuts[[0, 2, 2, 3]] + torch.tensor(visit.size([40, 10, 300, 0], [4, 1, 20, 0]))
    visible = torch.stack((since, ends), 1).repeat_interleave(torch.tensor(patches), 0)
    rows = len(visible) + 40  # as padded for tensor-parallel ranks

    def at_images(device: torch.device | str) -> Attention:
        segments = Segments.from_cu_seqlens(cuts, device)
        places = torch.zeros(len(visible), 2, device=device)
        memory = MemoryMap.build(segments, segments, visible, places, rows)
        return lambda query, key, value: memory_attention(query, key, value, memory)

    shapes = [(n, heads, width // 2) for n in (total, rows, rows)]
    _compare(visit, row, "look", shapes, at_images)


def _compare(
    visit: Visit,
    row: Row,
    name: str,
    shapes: Sequence[tuple[int, int, int]],
    of_device: Callable[[torch.device | str], Attention],
) -> None:
    """Compares an attention with that of the CPU in fp32; it may err as the CPU does in bf16, where
    the same tensors are rounded.

    Args:
        shapes: of queries, keys and values.
    """
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=g).bfloat16() for shape in shapes]
    direction = torch.randn(shapes[0], generator=g)

    def outcome(device: torch.device | str, dtype: torch.dtype) -> list[torch.Tensor]:
        return both_ways(of_device(device), inputs, direction, device, dtype)

    exact, cpu = (outcome("cpu", dtype) for dtype in (torch.float32, torch.bfloat16))
    found = outcome(visit.device, torch.bfloat16)
    row.note({f"{name}_kernel": varlen.suits(inputs[0].to(visit.device))})
    for what, a, b, c in zip(NAMES, found, cpu, exact, strict=True):
        row.at_most(f"{name} {what}", difference(a, c), 2 * difference(b, c) + 1e-3)


def _text(visit: Visit, attention: Callable) -> Callable[[int], Call]:
    """Forward and backward of a `*` layer's attention over one sample of a length."""

    def of(length: int) -> Call:
        segments = Segments.from_cu_seqlens(torch.tensor([0, length]), visit.device)
        heads, groups, width = _sizes(visit)
        leaves = _leaves(visit, [(length, n, width) for n in (heads, groups, groups)])
        return lambda: _both(attention(*leaves, segments), leaves)

    return of


def _tiles(visit: Visit) -> Callable[[int], Call]:
    """Forward and backward of a ViT layer's attention inside a number of tiles."""

    def of(count: int) -> Call:
        leaves = _leaves(visit, [(count, *visit.size((25, 1025, 128), (2, 17, 16)))] * 3)
        return lambda: _both(F.scaled_dot_product_attention(*leaves), leaves)

    return of


def _leaves(visit: Visit, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    made = (torch.randn(shape, device=visit.device) for shape in shapes)
    return [x.bfloat16().requires_grad_() for x in made]


def _both(out: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def _new_shapes(
    row: Row, name: str, make: Callable[[int], Call], sizes: Sequence[int]
) -> list[torch.Tensor]:
    """Notes the kernel, and medians of the first and the second call; returns the results of the
    last shape."""
    # Memory and the kernel's code are there when the first shape is met.
    kernel = kernels_of(make(sizes[0] + 1))
    calls = [make(size) for size in sizes]
    first, again = (statistics.median(_host_ms(call) for call in calls) for _ in range(2))
    row.note({f"{name}: kernel": kernel})
    row.note({f"{name}: first_ms": round(first, 3), f"{name}: again_ms": round(again, 3)})
    row.text.append(f"{name}: {first:.2f} ms, then {again:.2f}")
    return calls[-1]()


def kernels_of(call: Callable[[], object]) -> list[str]:
    """Names of the operators by which a call computes attention, as torch's profiler sees them."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    names = {event.key.rpartition("::")[2] for event in seen.key_averages()}
    chosen = (n for n in names if ("attention" in n or "attn" in n) and "backward" not in n.lower())
    return sorted(set(chosen) - {"scaled_dot_product_attention"})


def refusal(call: Callable[[], object]) -> str | None:
    """Why no allowed kernel takes the shapes of a call, by torch's warnings; None if one does."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except RuntimeError as error:
            if not any(words in str(error) for words in NO_KERNEL):
                raise
            return "; ".join([str(error), *(str(warning.message) for warning in caught)])
    return None


def _host_ms(function: Callable[[], object]) -> float:
    """A plan is made by the host, so its clock counts."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)

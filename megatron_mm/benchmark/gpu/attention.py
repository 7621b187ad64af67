"""Attention of lengths that were never seen: what the first call costs, with cuDNN and without.

cuDNN plans anew for every shape, and the lengths of microbatches change all the time. Runs switch
it off (`engine/kernels.py`); this check says whether that is right on the card.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from megatron_mm.benchmark.gpu.comparing import difference
from megatron_mm.benchmark.gpu.visit import Row, Visit
from megatron_mm.model.layers.attention import causal_attention
from megatron_mm.model.segments import Segments

# Both in bf16: probabilities and results are rounded by 2^-9 on average, in other blocks.
BF16 = 0.02


@contextmanager
def cudnn(used: bool) -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(used)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def text(visit: Visit, length: int) -> Callable[[], list[torch.Tensor]]:
    """Forward and backward of a `*` layer's attention over one sample."""
    segments = Segments.from_cu_seqlens(torch.tensor([0, length]), visit.device)
    heads, groups, width = visit.size((16, 2, 256), (4, 2, 16))
    leaves = _leaves(visit, [(length, heads, width), *[(length, groups, width)] * 2])
    query, key, value = leaves
    return lambda: _both(causal_attention(query, key, value, segments), leaves)


def tiles(visit: Visit, count: int) -> Callable[[], list[torch.Tensor]]:
    """Forward and backward of a ViT layer's attention inside tiles."""
    heads, positions, width = visit.size((25, 1025, 128), (2, 17, 16))
    leaves = _leaves(visit, [(count, heads, positions, width)] * 3)
    return lambda: _both(F.scaled_dot_product_attention(*leaves), leaves)


def _leaves(visit: Visit, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    made = (torch.randn(shape, device=visit.device) for shape in shapes)
    return [x.bfloat16().requires_grad_() for x in made]


def _both(out: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def _host_ms(function: Callable[[], object]) -> float:
    """A plan is made by the host, so its clock counts."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


def check(visit: Visit, row: Row) -> None:
    """Times the first and the second call of several shapes each way, and compares results."""
    kinds = {
        "text": (text, visit.size([8192, 7936, 7424, 6912, 6400, 5888], [72, 64])),
        "tiles": (tiles, visit.size([26, 25, 23, 21, 19, 17], [3, 2])),
    }
    for kind, (make, sizes) in kinds.items():
        results = {}
        for used in (False, True):
            with cudnn(used):
                # Memory and the kernel's code are there when the first shape is met.
                make(visit, sizes[0] + 1)()
                calls = [make(visit, size) for size in sizes]
                first = [_host_ms(call) for call in calls]
                again = [_host_ms(call) for call in calls]
                results[used] = calls[-1]()
            name = f"{kind}, cuDNN {'on' if used else 'off'}"
            found = statistics.median(first), statistics.median(again)
            row.note({f"{name}: first_ms": found[0], f"{name}: again_ms": found[1]})
            row.text.append(f"{name}: {found[0]:.2f} ms, then {found[1]:.2f}")
        pairs = zip(results[True], results[False], strict=True)
        row.at_most(f"{kind}: difference", max(difference(a, b) for a, b in pairs), BF16)

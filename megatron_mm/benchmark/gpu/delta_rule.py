"""The gated delta rule at the widths of mm-80b, over packed samples: ours against itself on the
CPU, flash-linear-attention against ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from megatron_mm.benchmark.gpu.comparing import both_ways, difference
from megatron_mm.benchmark.gpu.timing import medians
from megatron_mm.benchmark.gpu.visit import Row, Skip, Visit
from megatron_mm.model.backends.fla_here import missing_fla
from megatron_mm.model.layers.gdn.mix import (
    HeadWidths,
    convolve_and_scan,
    convolve_scan_and_keep,
)
from megatron_mm.model.segments import Segments

NAMES = ("output", "d qkv", "d convolution", "d decay", "d beta")
# fp32 in another order of summation.
FP32 = 1e-4
# The fused kernels may multiply fp32 in TF32: 10 bits of mantissa, 1e-3 a product, a few in a row.
FLA_FP32 = 5e-3
# The fused kernels round scores, both triangular products, states and results to bf16 between each
# other, backward again: some eight roundings of 2^-8.
FLA_BF16 = 8 * 2**-8


class Problem:
    """Inputs of a mix: samples of several lengths, unless told otherwise one of them empty."""

    def __init__(self, visit: Visit, tokens: int, key_heads: int, empty: bool = True):
        width = visit.size(128, 16)
        self.widths = HeadWidths(width, width, 2)
        third = tokens // 3
        cuts = [0, third, *[third] * empty, third + 1, third + 70, tokens]
        self.cuts = torch.tensor(cuts)
        g = torch.Generator().manual_seed(0)
        channels, values = key_heads * sum(self.widths.rows), 2 * key_heads
        self.inputs = [
            torch.randn(tokens, channels, generator=g),
            0.5 * torch.randn(channels, 4, generator=g),
            # Logarithms of decays, 0 to -1 a position, as softplus gives them at the start.
            -torch.rand(tokens, values, generator=g),
            torch.rand(tokens, values, generator=g),
        ]
        self.direction = torch.randn(tokens, values, width, generator=g)

    def rounded(self) -> list[torch.Tensor]:
        """The inputs in bf16; decays stay in fp32, as in the model."""
        return [x if n == 2 else x.bfloat16() for n, x in enumerate(self.inputs)]

    def on(self, mix: Callable, device: torch.device | str) -> Callable[..., torch.Tensor]:
        """A mix of these samples on a device, as a function of the four inputs."""
        segments = Segments.from_cu_seqlens(self.cuts, device)
        return partial(_mixed, mix, segments, self.widths)


def _mixed(mix: Callable, segments: Segments, widths: HeadWidths, *inputs: torch.Tensor):
    return mix(*inputs, segments, widths)


def check(visit: Visit, row: Row) -> None:
    """Compares output and gradients with the CPU's in fp32; in bf16 both with fp32."""
    problem = Problem(visit, visit.size(2048, 150), visit.size(4, 2))

    def outcome(inputs: list[torch.Tensor], device: torch.device | str) -> list[torch.Tensor]:
        mix = problem.on(convolve_and_scan, device)
        return both_ways(mix, inputs, problem.direction, device)

    wanted, found = (outcome(problem.inputs, device) for device in ("cpu", visit.device))
    for name, a, b in zip(NAMES, found, wanted, strict=True):
        row.at_most(f"fp32 {name}", difference(a, b), FP32)
    low = problem.rounded()
    exact = outcome([x.float() for x in low], "cpu")
    cpu, found = (outcome(low, device) for device in ("cpu", visit.device))
    for name, a, b, c in zip(NAMES, found, cpu, exact, strict=True):
        # The same tensors are rounded on both, so the errors are alike.
        row.at_most(f"bf16 {name}", difference(a, c), 2 * difference(b, c) + 1e-3)
    worst = max(row.figures[f"fp32 {name}"] for name in NAMES)
    row.text.append(f"fp32 within {worst:.1e} of the CPU, bf16 within the CPU's error")


def check_fla(visit: Visit, row: Row) -> None:
    """Compares the fused kernels with ours, states for decoding too, and times both."""
    missing = missing_fla()
    if missing is not None:
        raise Skip(missing)
    from megatron_mm.model.layers.gdn.fla import convolve_and_scan_fla, convolve_scan_and_keep_fla

    fused = (convolve_and_scan_fla, convolve_scan_and_keep_fla)
    problem = Problem(visit, visit.size(2048, 150), visit.size(4, 2))
    _compare_fla(visit, row, problem, "bf16", problem.rounded(), fused, FLA_BF16)
    _time(visit, row, {"ours": convolve_and_scan, "fla": convolve_and_scan_fla})
    # The last, since it is not trained in: kernels may lack the shared memory for it.
    _compare_fla(visit, row, problem, "fp32", problem.inputs, fused, FLA_FP32)


def _compare_fla(
    visit: Visit,
    row: Row,
    problem: Problem,
    dtype: str,
    inputs: list[torch.Tensor],
    fused: tuple[Callable, Callable],
    allowed: float,
) -> None:
    """Compares the fused mixes, plain and keeping states, with ours in fp32 of the same inputs."""
    # No prompt is empty, so nobody keeps a state of one.
    prompts = Problem(visit, visit.size(2048, 150), visit.size(4, 2), empty=False)
    device, exact = visit.device, [x.float() for x in inputs]
    wanted = both_ways(problem.on(convolve_and_scan, device), exact, problem.direction, device)
    found = both_ways(problem.on(fused[0], device), inputs, problem.direction, device)
    with torch.no_grad():
        for mix, given, out in (
            (convolve_scan_and_keep, exact, wanted),
            (fused[1], inputs, found),
        ):
            kept = prompts.on(mix, device)(*(x.to(device) for x in given))
            out += [x.cpu() for x in kept[1:]]
    names = (*NAMES, "inputs kept", "state kept")
    for name, a, b in zip(names, found, wanted, strict=True):
        row.at_most(f"{dtype} {name}", difference(a, b), allowed)
    worst = max(row.figures[f"{dtype} {name}"] for name in names)
    row.text.append(f"{dtype} within {worst:.1e} of ours")


def _time(visit: Visit, row: Row, mixes: dict[str, Callable]) -> None:
    """Times forward and backward of a sequence of the 80B model's, in bf16."""
    problem = Problem(visit, visit.size(8192, 150), visit.size(16, 2))
    leaves = [x.to(visit.device).requires_grad_() for x in problem.rounded()]
    direction = problem.direction.to(visit.device, torch.bfloat16)

    def side(mix: Callable) -> Callable:
        function = problem.on(mix, visit.device)
        return lambda: torch.autograd.grad(function(*leaves), leaves, direction)

    found = medians({name: side(mix) for name, mix in mixes.items()}, visit.size(7, 1))
    row.note({f"{name}_ms": round(ms, 3) for name, ms in found.items()})
    row.text.append(", ".join(f"{name} {ms:.2f} ms" for name, ms in found.items()))

"""The routed experts of a rank of mm-80b against the same experts one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from megatron_mm.benchmark.gpu.comparing import both_ways, difference
from megatron_mm.benchmark.gpu.timing import medians
from megatron_mm.benchmark.gpu.visit import Row, Visit
from megatron_mm.config import RunConfig, preset
from megatron_mm.model.core_config import language_config
from megatron_mm.model.layers.experts import GroupedExperts

NAMES = ("output", "d tokens", "d probabilities", "d gate and up", "d down")
# Two ways in bf16: gate, up, their product and the result are each rounded once in both, by 2^-9
# on average; backward once more.
BF16 = 0.01
# Experts of a rank and rows that reach it: 8,192 tokens with 10 experts each under EP16 and alone;
# a decoding step of 16 rows.
LOADS = ((32, 81920), (512, 81920), (512, 160))


def one_by_one(
    tokens_RH: torch.Tensor,
    probs_R: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    sizes: Sequence[int],
) -> torch.Tensor:
    """y = (silu(x W_gate^T) * x W_up^T * p) W_down^T, expert by expert, by plain autograd."""
    found = []
    rows = zip(tokens_RH.split(sizes), probs_R.split(sizes), strict=True)
    for (x, p), both, out in zip(rows, gate_up.unbind(), down.unbind(), strict=True):
        gate, up = (x @ half.t() for half in both.unbind())
        found.append((F.silu(gate) * up * p.to(x.dtype)[:, None]) @ out.t())
    return torch.cat(found)


class Experts:
    """A rank's module with weights of its own, as a function of rows, probabilities, weights."""

    def __init__(self, visit: Visit, count: int, rows: int):
        run = RunConfig(model=preset(visit.size("mm-80b", "tiny")))
        run.training.bf16 = True
        language = run.model.language
        self.count, self.rows = count, rows
        self.hidden, self.ffn = language.hidden_size, language.moe_ffn_hidden_size
        with torch.device("meta"):  # it computes with the weights that it is given
            self.module = GroupedExperts(
                count, language_config(run), pg_collection=visit.groups.pg, std=0.02, out_std=0.02
            )

    def inputs(self, device: torch.device | str) -> list[torch.Tensor]:
        """Rows, probabilities (fp32), gate and up, down; in bf16, drawn on the device."""
        torch.manual_seed(0)
        rows = torch.randn(self.rows, self.hidden, device=device)
        probs = torch.rand(self.rows, device=device)
        gate_up = torch.randn(self.count, 2, self.ffn, self.hidden, device=device).bfloat16()
        down = torch.randn(self.count, self.hidden, self.ffn, device=device).bfloat16()
        gate_up *= self.hidden**-0.5
        down *= self.ffn**-0.5
        return [rows.bfloat16(), probs, gate_up, down]

    def sizes(self) -> torch.Tensor:
        """int64 [experts]: uneven numbers of rows; every third expert has none."""
        g = torch.Generator().manual_seed(1)
        weights = torch.rand(self.count, generator=g) ** 2 + 0.01
        weights[::3] = 0
        chosen = torch.multinomial(weights, self.rows, replacement=True, generator=g)
        return chosen.bincount(minlength=self.count)

    def grouped(self, sizes: torch.Tensor) -> Callable[..., torch.Tensor]:
        """The module's forward pass."""

        def run(tokens_RH, probs_R, gate_up, down):
            weights = {"gate_up": gate_up, "down": down}
            given = (tokens_RH, sizes, probs_R)
            return torch.func.functional_call(self.module, weights, given)[0]

        return run


def check(visit: Visit, row: Row) -> None:
    """Compares and times."""
    _against_cpu(visit, row)
    for count, rows in LOADS:
        _against_loop(visit, row, visit.size(count, count // 16), visit.size(rows, rows // 512 + 7))


def _against_cpu(visit: Visit, row: Row) -> None:
    """Compares the module in bf16 on both devices with plain products in fp32."""
    experts = Experts(visit, visit.size(32, 6), visit.size(2048, 50))
    inputs, sizes = experts.inputs("cpu"), experts.sizes()
    direction = torch.randn(experts.rows, experts.hidden)
    plain = partial(one_by_one, sizes=sizes.tolist())
    exact = both_ways(plain, inputs, direction, "cpu", torch.float32)
    cpu, found = (
        both_ways(experts.grouped(sizes.to(device)), inputs, direction, device)
        for device in ("cpu", visit.device)
    )
    for name, a, b, c in zip(NAMES, found, cpu, exact, strict=True):
        # The same tensors are rounded on both, so the errors are alike.
        row.at_most(f"{name}", difference(a, c), 2 * difference(b, c) + 1e-3)
    row.text.append("within the CPU's error in bf16")


def _against_loop(visit: Visit, row: Row, count: int, rows: int) -> None:
    """Compares and times the module and single products, both on the GPU."""
    experts = Experts(visit, count, rows)
    sizes = experts.sizes()
    leaves = [x.requires_grad_() for x in experts.inputs(visit.device)]
    direction = torch.randn_like(leaves[0])
    sides: dict[str, Callable[..., torch.Tensor]] = {
        "grouped": experts.grouped(sizes.to(visit.device)),
        "loop": partial(one_by_one, sizes=sizes.tolist()),
    }
    results = {}
    for name, side in sides.items():
        out = side(*leaves)
        results[name] = [out.detach(), *torch.autograd.grad(out, leaves, direction)]
    case = f"{count} experts, {rows} rows"
    for name, a, b in zip(NAMES, results["grouped"], results["loop"], strict=True):
        row.at_most(f"{case}: {name}", difference(a, b), BF16)
    del results

    def forward(side: Callable) -> Callable:
        def once() -> None:
            with torch.no_grad():
                side(*leaves)

        return once

    def both(side: Callable) -> Callable:
        return lambda: torch.autograd.grad(side(*leaves), leaves, direction)

    rounds = visit.size(7, 1)
    ways = medians({name: forward(side) for name, side in sides.items()}, rounds)
    whole = medians({name: both(side) for name, side in sides.items()}, rounds)
    flops = 6 * rows * experts.ffn * experts.hidden
    for name in sides:
        row.note({f"{case}: {name}_ms": [round(ways[name], 3), round(whole[name], 3)]})
    if ways["grouped"]:
        row.note({f"{case}: tflops": round(flops / ways["grouped"] / 1e9, 1)})
    row.text.append(f"{case} {ways['grouped']:.2f} ms, one by one {ways['loop']:.2f}")

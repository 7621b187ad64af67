"""Experts in one kernel beside experts one after the other; what a layer of experts launches.

torch's grouped product runs on the CPU too, as the same products in the same order, so the two
must agree bitwise here. Its kernel for a GPU is measured by tests/gpu.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mm import platform
from megatron_mm.model.backends.choice import choose
from megatron_mm.model.core_config import language_config
from megatron_mm.model.layers import experts
from megatron_mm.model.layers.moe import MixtureOfExperts
from megatron_mm.model.layers.row_groups import (
    InOneKernel,
    OneByOne,
    RowGroups,
    fits_one_kernel,
)
from megatron_mm.report.metrics import MUTED
from support.batches import small_run
from support.experts import multiply_by

CPU, META = torch.device("cpu"), torch.device("meta")
SIZES = {
    "some without rows": [0, 5, 0, 2, 1, 0],
    "the first alone": [7, 0, 0, 0, 0, 0],
    "the last alone": [0, 0, 0, 0, 0, 7],
    "no rows at all": [0] * 6,
    "one row": [0, 0, 1, 0, 0, 0],
}
FROZEN = {"none": (), "all": ("gate_up", "down"), "down": ("down",), "gate_up": ("gate_up",)}


def products(groups: RowGroups, rows: int, dtype: torch.dtype, frozen=()) -> dict:
    """Output and gradients of six experts of widths that differ, on the CPU."""
    g = torch.Generator().manual_seed(rows)
    shapes = {"x": (rows, 24), "probs": (rows,), "gate_up": (6, 2, 16, 24), "down": (6, 24, 16)}
    made = {
        name: torch.randn(shape, generator=g).to(dtype).requires_grad_(name not in frozen)
        for name, shape in shapes.items()
    }
    out = experts._Experts.apply(*made.values(), groups)
    out.backward(torch.randn(out.shape, generator=g).to(dtype))
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in made.items()}}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_one_kernel_computes_what_the_loop_does(sizes, dtype, frozen):
    counts = SIZES[sizes]
    args = sum(counts), dtype, FROZEN[frozen]
    found = products(InOneKernel(torch.tensor(counts), CPU), *args)
    expected = products(OneByOne(counts), *args)
    assert [name for name, value in found.items() if value is None] == list(FROZEN[frozen])
    for name, value in expected.items():
        assert value is None or torch.equal(found[name], value), name
        assert value is None or found[name].dtype == dtype


def test_experts_without_rows_have_gradient_zero():
    found = products(InOneKernel(torch.tensor(SIZES["some without rows"]), CPU), 8, torch.float32)
    for name in ("gate_up", "down"):
        moved = found[name].flatten(1).abs().sum(1) > 0
        assert moved.tolist() == [False, True, False, True, True, False]


# ---- the choice ----


@pytest.mark.parametrize(
    "capability, dtype, number, features, fits",
    [
        ((9, 0), torch.bfloat16, 512, (2048, 512), True),
        ((10, 0), torch.bfloat16, 1023, (2048, 512), True),
        ((9, 0), torch.bfloat16, 1024, (2048, 512), False),  # groups a kernel takes
        ((8, 0), torch.bfloat16, 512, (2048, 512), False),  # an A100 would wait and loop
        ((12, 0), torch.bfloat16, 512, (2048, 512), False),  # nor Blackwell of desktops
        (None, torch.bfloat16, 512, (2048, 512), False),
        ((9, 0), torch.float32, 512, (2048, 512), False),
        ((9, 0), torch.bfloat16, 512, (2048, 28), False),  # rows of 56 bytes
        ((9, 0), torch.bfloat16, 512, (2044, 512), False),
        ((9, 0), torch.bfloat16, 512, (8, 8), True),
    ],
)
def test_what_fits_one_kernel(capability, dtype, number, features, fits):
    assert fits_one_kernel(capability, dtype, number, features) is fits


def test_the_cpu_loops(pg):
    rows = torch.zeros(3, 64, dtype=torch.bfloat16)
    assert isinstance(layer_of(6, pg).experts.groups(torch.tensor([3]), rows), OneByOne)


@pytest.mark.parametrize("ffn, chosen", [(32, InOneKernel), (28, OneByOne)])
def test_a_gpu_gets_one_kernel_where_the_widths_allow(monkeypatch, pg, ffn, chosen):
    monkeypatch.setattr(platform, "compute_capability", lambda device: (9, 0))
    rows = torch.zeros(3, 64, dtype=torch.bfloat16)
    made = layer_of(6, pg, ffn).experts.groups(torch.tensor([0, 1, 0, 2, 0, 0]), rows)
    assert isinstance(made, chosen)


@pytest.mark.parametrize("ffn", [28, 32])  # rows of 56 and 64 bytes; the kernel wants 16s
def test_a_step_computes_experts_of_any_width(pg, ffn):
    experts_here = layer_of(6, pg, ffn).experts
    torch.nn.init.normal_(experts_here.gate_up, std=0.1)
    torch.nn.init.normal_(experts_here.down, std=0.1)
    sizes = torch.tensor([0, 5, 0, 2, 1, 0])
    rows = torch.randn(10, 64, dtype=torch.bfloat16)  # the last two are nobody's
    weights = torch.rand(10)
    with torch.no_grad():
        whole, _ = experts_here(rows[:8], sizes, weights[:8])
        found = experts_here.step(rows, sizes.cumsum(0).int(), weights)
    # One rounding to 8 bits a product, if the kernels add in another order.
    torch.testing.assert_close(found[:8], whole, rtol=2**-7, atol=1e-4)


# ---- a layer ----


def layer_of(number: int, pg, ffn: int = 32) -> MixtureOfExperts:
    """A layer in bf16 with this many experts, of which a position takes ten or all."""
    run = small_run()
    run.training.bf16 = True
    run.model.language.num_experts, run.model.language.moe_ffn_hidden_size = number, ffn
    run.model.language.moe_router_topk = min(10, number)
    return MixtureOfExperts(language_config(run), pg, 0, 0.1, 0.1, choose(run.backend))


class Launches(TorchDispatchMode):
    """Counts operations that are no view and no allocation: each is a kernel of a GPU, at least."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        written = any(r.alias_info is None or r.alias_info.is_write for r in func._schema.returns)
        self.count += written and func._overloadpacket not in ALLOCATE
        return func(*args, **kwargs or {})


aten = torch.ops.aten
ALLOCATE = (aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided, aten.detach)
ALLOCATE += (aten.new_empty_strided, aten._unsafe_view, aten.lift_fresh, aten.alias, aten.view)


def on_a_device_without_numbers(layer: MixtureOfExperts, training: bool) -> tuple[int, int]:
    """Passes 40 positions through a layer whose tensors have shapes alone, and back if training.
    Whatever asks for a number fails: a GPU's host would wait there. Returns the launches of the
    forward pass and of both."""
    layer.train(training)
    context = SimpleNamespace(
        loss_weight=torch.ones((), device=META),
        padding_1t=None,
        routing=None,
        scope=None,
        metrics=MUTED,
    )
    hidden = torch.zeros(40, 1, 64, dtype=torch.bfloat16, device=META, requires_grad=training)
    with platform.standing_in(META), torch.set_grad_enabled(training), Launches() as launches:
        out = layer(hidden, context)
        forward = launches.count
        if training:
            out.backward(torch.empty_like(out))
    return forward, launches.count


def alone_on_meta(number: int, pg, groups: Callable[..., RowGroups]) -> MixtureOfExperts:
    layer = layer_of(number, pg).to(META)
    multiply_by(layer, groups)
    return layer


def one_kernel(sizes_E, rows_RH) -> InOneKernel:
    return InOneKernel(sizes_E, rows_RH.device)


def loop(sizes_E, rows_RH) -> OneByOne:
    even = len(rows_RH) // len(sizes_E)
    return OneByOne([even] * (len(sizes_E) - 1) + [len(rows_RH) - even * (len(sizes_E) - 1)])


@pytest.mark.parametrize("training", [False, True])
def test_nothing_waits_for_the_device(pg, training):
    assert on_a_device_without_numbers(alone_on_meta(32, pg, one_kernel), training)[0] > 0
    asking = layer_of(32, pg).to(META)  # its loop wants the sizes
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        on_a_device_without_numbers(asking, training)


@pytest.mark.parametrize("training", [False, True])
def test_launches_do_not_grow_with_the_experts(pg, training):
    """megatron_mm/model/README.md has these numbers: of a forward pass, and back."""
    few, many = (
        on_a_device_without_numbers(alone_on_meta(n, pg, one_kernel), training) for n in (32, 512)
    )
    assert few == many
    assert few == ((46, 100) if training else (33, 33))
    looped = on_a_device_without_numbers(alone_on_meta(512, pg, loop), training)
    # A product an expert for each of the grouped ones: two forward, four back. The ends of the
    # groups are an operation, too, and the loop has none.
    extra = 2 * 511 - 1
    assert looped[0] == few[0] + extra
    assert looped[1] == few[1] + extra + training * 4 * 511

"""Kernels, bytes and waits of single operations, and the time that a sequence of them takes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from megatron_mm import platform
from megatron_mm.config import ConfigError
from megatron_mm.model.layers.norms import RMSNorm
from megatron_mm.perf.fake import META
from megatron_mm.perf.hardware import GPU, Assumptions
from megatron_mm.perf.kernels import Kernel, Link, Work
from megatron_mm.perf.predict import Terms, played, roughly
from megatron_mm.perf.recorder import Recorder
from megatron_mm.perf.standins import fused_kernels, updating

KIB = 1024


def tensor(*shape: int, dtype=torch.float32, grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META, requires_grad=grad)


@pytest.fixture
def recorder():
    with platform.standing_in(META, (9, 0)):
        yield Recorder(SimpleNamespace())


def recorded(recorder: Recorder, run) -> Work:
    before = len(recorder.kernels)
    with recorder:
        run()
    return Work.of(recorder.kernels[before:])


# A vector of 256 fp32 numbers is one KiB.
BYTES = {
    "a sum reads two and writes one": (lambda a, b: a + b, 3, 1),
    "in place it writes over what it read": (lambda a, b: a.add_(b), 3, 1),
    "a copy does not read its target": (lambda a, b: a.copy_(b), 2, 1),
    "zeros are written": (lambda a, b: a.zero_(), 1, 1),
    "with out= the result is not read": (lambda a, b: torch.mul(a, b, out=a.new_empty(256)), 3, 1),
    "a view costs nothing": (lambda a, b: a.view(16, 16).t(), 0, 0),
    "nor does memory": (lambda a, b: torch.empty_like(a), 0, 0),
    "a list of tensors in place": (lambda a, b: torch._foreach_mul_([a, b], 2.0), 4, 1),
    "of an expanded tensor what is there": (lambda a, b: a.expand(4, 256) + 0.0, 5, 1),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_and_launches_by_hand(recorder, name):
    run, kib, launches = BYTES[name]
    done = recorded(recorder, lambda: run(tensor(256), tensor(256)))
    assert (done.moved, done.launches, done.waits) == (kib * KIB, launches, 0)


def test_rows_that_are_picked_or_put_count_and_not_what_they_lie_in(recorder):
    table, two = tensor(1000, 256), torch.empty(2, dtype=torch.int64, device=META)
    picked = recorded(recorder, lambda: F.embedding(two, table))
    assert picked.moved == (2 + 2) * KIB + 16
    put = recorded(recorder, lambda: table.index_copy_(0, two, tensor(2, 256)))
    assert put.moved == (2 + 2 + 2) * KIB + 16  # the values read; their places read and written


def test_what_the_host_waits_for(recorder):
    def copies():
        host = torch.zeros(4)
        host.to(META)
        tensor(4).copy_(host)

    def without():
        host = torch.zeros(4)
        host.to(META, non_blocking=True)
        tensor(4).copy_(host, non_blocking=True)
        picks = torch.empty(2, dtype=torch.int64, device=META)
        tensor(4)[picks]
        tensor(4)[tensor(4) > 0] = 0.0  # a masked_fill

    assert recorded(recorder, copies).waits == 2
    assert recorded(recorder, without).waits == 0
    assert recorded(recorder, lambda: tensor(4)[torch.tensor([0])]).waits == 1  # copied before it
    with updating(recorder, 3.0):
        assert recorded(recorder, lambda: float(tensor(4).sum())).waits == 1
        assert recorded(recorder, lambda: tensor(4).tolist()).waits == 1  # all in one copy
        with recorder:
            assert tensor(2).tolist() == [3.0, 3.0]


def test_work_of_the_host_is_no_kernel(recorder):
    assert recorded(recorder, lambda: torch.arange(8).cumsum(0)) == Work()


def test_grouped_products_count_every_row_once(recorder):
    rows = tensor(64, 16, dtype=torch.bfloat16)
    weights = tensor(4, 16, 32, dtype=torch.bfloat16)
    ends = torch.empty(4, dtype=torch.int32, device=META)
    forward = recorded(recorder, lambda: F.grouped_mm(rows, weights, offs=ends))
    assert (forward.flops, forward.launches) == (2 * 64 * 16 * 32, 1)
    gradient = tensor(64, 32, dtype=torch.bfloat16)
    weight = recorded(recorder, lambda: F.grouped_mm(gradient.t(), rows, offs=ends))
    assert (weight.flops, weight.launches) == (2 * 64 * 16 * 32, 1)


def test_attention_of_packed_streams_is_one_kernel(recorder):
    ends = torch.empty(3, dtype=torch.int32, device=META)
    packed = [tensor(64, 4, 16, dtype=torch.bfloat16, grad=True) for _ in range(3)]
    sizes = ends, ends, 32, 32
    forward = recorded(recorder, lambda: varlen_attn(*packed, *sizes))
    assert (forward.flops, forward.launches) == (2 * 2 * 4 * 64 * 32 * 16, 1)
    with recorder:
        out = varlen_attn(*packed, *sizes)
    backward = recorded(recorder, lambda: out.backward(tensor(64, 4, 16, dtype=torch.bfloat16)))
    assert backward.flops == 5 * 2 * 4 * 64 * 32 * 16  # the scores again, then four products


def test_a_norm_is_the_one_kernel_of_a_gpu(recorder):
    """torch's own of tensors without memory is a row of kernels, as on the CPU, for which they may
    stand too."""
    x = tensor(8, 256, grad=True)

    def run():
        F.rms_norm(x, (256,), None, 1e-6).backward(tensor(8, 256))

    loose = recorded(recorder, run)
    x.grad = None
    with fused_kernels(recorder.add):
        fused = recorded(recorder, run)
    assert fused.launches == 2 and fused.moved == 8 * KIB * (2 + 3)
    assert loose.launches > 8 and loose.moved > 3 * fused.moved
    with fused_kernels(recorder.add):  # a weight of another type: not fused on a GPU either
        mixed = recorded(recorder, lambda: F.rms_norm(x, (256,), tensor(256, dtype=torch.bfloat16)))
    assert mixed.launches > 2
    with platform.standing_in(META), fused_kernels(recorder.add):
        assert recorded(recorder, lambda: F.rms_norm(x, (256,))).launches > 3
    with fused_kernels(recorder.add), META:
        norm = RMSNorm(256, 1e-6, partial_gradient=False, dtype=torch.bfloat16)
        y = norm(tensor(8, 256, dtype=torch.bfloat16))
    assert y.shape == (8, 256) and y.dtype == torch.bfloat16


# 1 FLOP, or 1 byte, is a second; 1 FLOP in fp32 is four; a launch takes 2, a wait 5.
UNIT = GPU("unit", 1.0, 0.25, 1.0, 1.0, 1.0, 1.0, 8, "made up")
ASSUMED = Assumptions(1.0, 1.0, 1.0, launch=2.0, wait=5.0)


def seconds(*kernels: Kernel) -> tuple[float, ...]:
    terms = played(kernels, {"ep": range(2)}, UNIT, ASSUMED)
    return terms.products, terms.elementwise, terms.collectives, terms.idle


def test_launches_cost_where_the_device_would_be_idle():
    small, large = Kernel(moved=1), Kernel(flops=100, moved=1)
    assert seconds(large) == (100.0, 0.0, 0.0, 2.0)
    # Launched while the large one runs: only the first launch is waited for.
    assert seconds(large, *[small] * 10) == (100.0, 10.0, 0.0, 2.0)
    # The other way round nothing hides them: a launch every 2 s, each busy for 1.
    assert seconds(*[small] * 10, large) == (100.0, 10.0, 0.0, 12.0)


def test_a_wait_costs_its_latency_and_the_lead_of_the_host():
    small, large = Kernel(moved=1), Kernel(flops=100)
    waits = Kernel(launched=False, waits=True)
    assert seconds(large, waits, small) == (100.0, 1.0, 0.0, 2.0 + 5.0 + 2.0)
    before = seconds(large, *[small] * 10)[-1]
    after = seconds(large, waits, *[small] * 10)[-1]
    assert after == before + 5.0 + 2.0 + 9 * (2.0 - 1.0)
    assert seconds(large, Kernel(moved=1, waits=True), small)[-1] == 2.0 + 5.0 + 2.0


def test_products_are_bound_by_what_they_read_and_collectives_by_their_links():
    assert seconds(Kernel(flops=3, moved=50)) == (50.0, 0.0, 0.0, 2.0)
    sent = Kernel(moved=8, link=Link("all_to_all", "ep"))
    assert seconds(sent) == (0.0, 0.0, 4.0, 2.0)  # half of it stays here
    assert Terms(1.0, 2.0, 3.0, 4.0).times(2) + Terms(1.0) == Terms(3.0, 4.0, 6.0, 8.0)


def test_products_in_fp32_have_a_peak_of_their_own(recorder):
    """In a run in bf16 too: its routers' are in fp32, or in fp64."""
    assert seconds(Kernel(flops=3, fp32=True)) == (12.0, 0.0, 0.0, 2.0)
    work = {}
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
    for name, dtype in dtypes.items():
        a, b = tensor(4, 8, dtype=dtype, grad=True), tensor(8, 2, dtype=dtype, grad=True)
        work[name] = recorded(recorder, lambda a=a, b=b: (a @ b).sum().backward())
    assert {one.flops for one in work.values()} == {3 * 2 * 4 * 8 * 2}
    assert work["fp32"].fp32 == work["fp64"].fp32 == work["fp32"].flops and not work["bf16"].fp32
    both = Work(flops=3, fp32=1)
    assert roughly(both, {}, UNIT, replace(ASSUMED, launch=0.0)) == 2.0 + 4.0
    assert both.times(2) + both == Work(flops=9, fp32=3)


def test_attention_backward_begins_with_the_scores_again(recorder):
    rows = [tensor(1, 4, 64, 16, dtype=torch.bfloat16, grad=True) for _ in range(3)]
    with fused_kernels(recorder.add), recorder:
        F.scaled_dot_product_attention(*rows).sum().backward()
    assert recorder.work.again == 2 * 4 * 64 * 64 * 16


def test_assumptions_can_be_given():
    assert Assumptions.given(["launch=1e-5", "compute=0.5"]) == Assumptions(0.5, launch=1e-5)
    for words, message in (
        (["lunch=1"], "unknown assumption lunch"),
        (["launch=much"], "allowed: launch=NUMBER"),
        (["compute=1.5"], "compute is 1.5; allowed: above 0, at most 1"),
        (["wait=-1"], "wait is -1; allowed: 0 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            Assumptions.given(words)

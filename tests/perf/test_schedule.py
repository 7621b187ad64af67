"""Orders, memory in flight and bubbles, against megatron-core and by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from megatron_mm.perf.kernels import Work
from megatron_mm.perf.schedule import Event, activation_peak, events, timeline
from megatron_mm.perf.trace import ChunkTrace

SHAPES = [(1, 1, 3), (4, 1, 2), (4, 1, 9), (2, 3, 4), (4, 2, 8), (3, 2, 6)]


@pytest.mark.parametrize(("ranks", "chunks", "microbatches"), SHAPES)
def test_orders_are_those_of_megatron_core(ranks, chunks, microbatches):
    for rank in range(ranks):
        order = events(rank, ranks, chunks, microbatches)
        group = SimpleNamespace(size=lambda: ranks, rank=lambda r=rank: r)
        talk = SimpleNamespace(
            pp_group=group, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None
        )
        total, _, warm_up, _ = get_pp_rank_microbatches(
            microbatches, chunks, ranks, p2p_communicator=talk
        )
        first_backward = next(n for n, event in enumerate(order) if not event.forward)
        # megatron-core's steady state begins with one forward pass more.
        assert first_backward == min(warm_up + 1, total)
        table = get_schedule_table(microbatches, chunks, ranks)
        forward = [(e.microbatch, e.chunk) for e in order if e.forward]
        backward = [(e.microbatch, e.chunk) for e in order if not e.forward]
        if chunks > 1:
            assert forward == [tuple(row) for row in table]
            assert backward == [(batch, chunks - 1 - chunk) for batch, chunk in table]
        assert sorted(forward) == sorted(backward)
        assert len(forward) == microbatches * chunks


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 2), (4, 8), (8, 8)])
def test_the_bubble_of_equal_stages(ranks, microbatches):
    found = timeline(ranks, microbatches, [1.0] * ranks, [2.0] * ranks)
    assert found.seconds == pytest.approx(3.0 * (microbatches + ranks - 1))
    assert found.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))


def test_virtual_stages_divide_the_bubble():
    # Narayanan et al. 2021, section 2.2: (p - 1) / v microbatches' worth of waiting.
    found = timeline(4, 8, [0.5] * 8, [1.0] * 8)
    assert found.seconds == pytest.approx(8 * 3.0 + 3 * 3.0 / 2)


def test_a_slow_stage_sets_the_pace():
    even = timeline(4, 16, [1.0] * 4, [2.0] * 4).seconds
    uneven = timeline(4, 16, [3.0, 1.0, 1.0, 1.0], [6.0, 2.0, 2.0, 2.0]).seconds
    assert uneven > 2.4 * even


def test_memory_in_flight_by_hand():
    trace = ChunkTrace(0, 0, 12, 10, 15, Work(), Work())
    orders = {rank: events(rank, 4, 1, 8) for rank in range(4)}
    assert orders[3][:2] == [Event(True, 0, 0), Event(False, 0, 0)]
    # rank r holds 4 - r microbatches when the oldest runs backward
    peaks = [activation_peak(orders[rank], [trace]) for rank in range(4)]
    assert peaks == [45, 35, 25, 15]

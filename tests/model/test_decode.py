"""One position at a time from the states that whole samples leave, against the whole at once."""

from __future__ import annotations

import pytest
import torch

from megatron_mm.model.decode import DecodeCache, Filling
from megatron_mm.model.layers.gdn.layer import DeltaState
from megatron_mm.model.layers.gdn.mix import HeadWidths, convolve_and_scan, convolve_scan_and_keep
from megatron_mm.model.layers.gdn.step import by_part, convolve_and_step
from megatron_mm.model.segments import Segments

WIDTHS = HeadWidths(key=6, value=5, values=2)
KEY_HEADS, TAPS = 3, 4


def inputs(tokens: int, seed: int, width: int = TAPS):
    g = torch.Generator().manual_seed(seed)
    channels, heads = KEY_HEADS * sum(WIDTHS.rows), KEY_HEADS * WIDTHS.values
    qkv = torch.randn(tokens, channels, generator=g)
    decay = -torch.rand(tokens, heads, generator=g) * 0.5
    beta = torch.rand(tokens, heads, generator=g)
    return qkv, decay, beta, torch.randn(channels, width, generator=g)


def segments(lengths) -> Segments:
    return Segments.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0))


# 1 is shorter than the convolution; 32 and 33 end and begin a chunk; 70 has three.
LENGTHS = (5, 1, 32, 33, 70, 2)


@pytest.mark.parametrize(("split", "width"), [(1, TAPS), (2, TAPS), (31, TAPS), (2, 2), (2, 1)])
def test_steps_go_on_where_samples_ended(split, width):
    """Prefixes of every sample at once, then their last `split` positions one by one."""
    lengths = [length + split for length in LENGTHS]
    qkv, decay, beta, conv = inputs(sum(lengths), 0, width)
    whole = convolve_and_scan(qkv, conv, decay, beta, segments(lengths), WIDTHS)
    ends = torch.tensor(lengths).cumsum(0)
    head = torch.cat([torch.arange(e - n, e - split) for e, n in zip(ends, lengths, strict=True)])
    cache = DecodeCache(len(lengths))
    state = cache.state("G", 0, DeltaState)
    rows = torch.arange(len(lengths)).flip(0)  # rows need not be in the order of the prompts
    cache.filling = Filling(rows, torch.arange(len(lengths)))

    arguments = qkv[head], conv, decay[head], beta[head], segments(LENGTHS), WIDTHS
    found = [state.fill(convolve_scan_and_keep, *arguments)]
    cache.filling = None
    order = by_part(KEY_HEADS, WIDTHS.rows)
    taps, held = conv[order].t().unbind(), (state.tensors["inputs"], state.tensors["state"])
    places = [x.data_ptr() for x in held]
    for back in range(split, 0, -1):
        at = ends[rows] - back
        mixed = convolve_and_step(qkv[at][:, order], taps, decay[at], beta[at], *held, WIDTHS)
        found.append(mixed.index_select(0, rows))
    assert [state.tensors[name].data_ptr() for name in ("inputs", "state")] == places
    expected = [whole[head], *(whole[ends - back] for back in range(split, 0, -1))]
    for ours, theirs in zip(found, expected, strict=True):
        # fp32 sums of at most 101 terms in another order.
        assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max().clamp(min=1)


def test_a_prompts_state_goes_to_every_row_that_wants_it_and_to_no_other():
    cache = DecodeCache(5)
    state = cache.state("G", 0, DeltaState)
    qkv, decay, beta, conv = inputs(12, 1)
    cache.filling = Filling(torch.tensor([4, 1, 2]), torch.tensor([1, 1, 0]))
    arguments = qkv, conv, decay, beta, segments((5, 7)), WIDTHS
    state.fill(convolve_scan_and_keep, *arguments)
    _, tail, final = convolve_scan_and_keep(*arguments)
    tail = tail[..., by_part(KEY_HEADS, WIDTHS.rows)]
    for name, of_prompt in (("inputs", tail), ("state", final)):
        held = state.tensors[name]
        assert torch.equal(held[[4, 1, 2]], of_prompt[[1, 1, 0]])
        assert not held[[0, 3]].any()
    cache.keep(torch.tensor([2, 4]))
    assert torch.equal(state.tensors["state"], final) and cache.rows == 2


def test_what_a_step_reads_grows_by_an_eighth_within_the_room():
    cache, spans = DecodeCache(1), []
    cache.reserve(5000)
    for positions in range(1, 5001):
        cache.read(positions)
        assert positions <= cache.span <= max(positions + 63, positions * 9 / 8)
        spans.append(cache.span)
    assert cache.room == 5056 and spans[-1] <= cache.room
    assert sorted(set(spans)) == [
        *range(64, 1025, 64),
        *range(1152, 2049, 128),
        *range(2304, 4097, 256),
        *(4608, 5056),
    ]

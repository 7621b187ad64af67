"""Packs of a heavy-tailed trace: how full, how even, and that every sample gets its turn."""

import json

import numpy as np
import pytest

from megatron_mm.data.loading.order import Order, PhaseSize
from megatron_mm.data.loading.packing import pack, spread
from megatron_mm.data.loading.shuffle import RowGroup
from megatron_mm.data.loading.steps import MAX_BAD_RUN, Packed, assign
from megatron_mm.data.sample import Size
from megatron_mm.errors import DataError
from support import traces

CAPACITY = traces.SEQ_LENGTH


@pytest.fixture(scope="module")
def trace():
    return traces.read()


def plan(sizes, packs, samples=None, skip_bad=False, seed=0, most_tiles=None):
    """Over `sizes` in shuffled epochs. `samples`: how many in all, default endless."""
    order = Order([PhaseSize(([RowGroup(len(sizes), 0)],), (1.0,), samples)], seed)
    return Packed(order, packs, CAPACITY, lambda n: sizes[order.row(n)[2]], skip_bad, most_tiles)


def epoch(sizes, packs):
    """The steps of about one epoch, all of them full."""
    made, steps = plan(sizes, packs), []
    while made.state_dict()["position"] < len(sizes):
        steps.append(made.next_step())
    return steps


def test_the_trace_is_heavy_tailed(trace):
    tokens, tiles = np.array(trace).T
    assert len(trace) == traces.ROWS and tokens.max() <= CAPACITY
    assert np.mean(tokens) > 1.5 * np.median(tokens)
    heaviest = np.sort(tiles)[-len(tiles) // 10 :].sum() / tiles.sum()
    assert heaviest > 0.4 and (tiles == 0).mean() > 0.4  # a tenth of the rows: 40% of the tiles


@pytest.mark.parametrize("packs", [4, 16, 32, 64])
def test_packs_are_full(trace, packs):
    """The requirement is 0.97 on average (measured: 0.996 to 0.9996); the smallest steps choose
    from the fewest samples."""
    filled = []
    for step in epoch(trace, packs):
        assert len(step.microbatches) == packs
        assert max(load.tokens for load in step.loads) <= CAPACITY
        filled.append(sum(load.tokens for load in step.loads) / (packs * CAPACITY))
    assert len(filled) >= 10 and np.mean(filled) >= 0.985 and min(filled) >= 0.95


@pytest.mark.parametrize(("ranks", "each"), [(4, 4), (4, 8), (8, 4), (8, 8), (16, 4)])
def test_ranks_get_even_tokens_and_tiles(trace, ranks, each):
    """max / mean over data-parallel ranks, in every single step, with at least four
    microbatches a rank."""
    for step in epoch(trace, ranks * each):
        shares = assign(step, ranks)
        assert sorted(m for share in shares for m in share) == list(range(ranks * each))
        assert {len(share) for share in shares} == {each}
        sums = np.array([np.sum([step.loads[m] for m in share], axis=0) for share in shares])
        assert (sums.max(0) / sums.mean(0) <= 1.05).all(), sums


def test_dealing_out_in_turn_would_not_be_even(trace):
    """The control of the test above: the limit is not met by itself."""
    step = epoch(trace, 32)[0]
    sums = [sum(load.tiles for load in step.loads[rank::8]) for rank in range(8)]
    assert max(sums) > 1.1 * np.mean(sums)


def test_fewer_microbatches_a_rank_are_even_on_average(trace):
    """With two, one sample of many tiles is too large a part of its rank's share."""
    worst = []
    for step in epoch(trace, 16):
        sums = [sum(step.loads[m].tiles for m in share) for share in assign(step, 8)]
        worst.append(max(sums) / np.mean(sums))
    assert np.mean(worst) <= 1.15


@pytest.fixture(scope="module")
def short(trace):
    """The trace with an eighth of the tokens: images whose thumbnail alone stands in the stream."""
    return [Size(-(-size.tokens // 8), size.tiles) for size in trace]


@pytest.mark.parametrize("share", [1.0, 1.5])
def test_packs_hold_no_more_tiles_than_allowed(short, share):
    """Nor does any row wait for ever, also if one alone has as many as are allowed. Packs are then
    full of tiles, but for less than a tenth on average."""
    most = int(share * max(size.tiles for size in short))
    assert min(load.tiles for step in epoch(short, 4)[:3] for load in step.loads) > most
    made, seen, filled = plan(short, 16, len(short), most_tiles=most), [], []
    while len(seen) < len(short):
        step = made.next_step()
        assert max(load.tiles for load in step.loads) <= most
        assert max(load.tokens for load in step.loads) <= CAPACITY
        seen += [n for numbers in step.microbatches for n in numbers]
        filled.append(np.mean([load.tiles / most for load in step.loads]))
    assert sorted(seen) == list(range(len(short)))
    assert np.mean(filled[: len(filled) // 2]) > 0.9


def test_a_limit_that_binds_nothing_changes_nothing(trace):
    unlimited, limited = plan(trace, 8), plan(trace, 8, most_tiles=10**6)
    assert [unlimited.next_step() for _ in range(5)] == [limited.next_step() for _ in range(5)]


@pytest.mark.parametrize("most_tiles", [None, 31])  # of the trace's heaviest row
def test_every_sample_is_trained_on_once_and_none_waits_long(trace, most_tiles):
    made = plan(trace, 16, len(trace), most_tiles=most_tiles)
    seen, waited, taken = [], {}, []
    for number in range(10**4):
        try:
            step = made.next_step()
        except DataError as error:
            assert f"the phases' {len(trace)} samples are used up" in str(error)
            break
        new = [n for numbers in step.microbatches for n in numbers]
        held = made.state_dict()["held"]
        assert not held or min(held) > min(new)  # the one that waited longest got its turn
        for sample in held:
            waited[sample] = waited.get(sample, 0) + 1
        seen += new
        taken.append(number)
    assert sorted(seen) == list(range(len(trace)))
    # The buffer holds 1.5 steps, the first of which is filled from the front.
    assert max(waited.values()) <= 4


def test_the_worst_buffer_still_lets_everyone_in():
    """Samples that are just over half a pack: one a pack, half full, in order of waiting."""
    sizes = [Size(CAPACITY // 2 + 1, 1)] * 40 + [Size(CAPACITY, 0)] * 5
    made = plan(sizes, 4, len(sizes))
    seen = []
    while len(seen) < len(sizes):
        step = made.next_step()
        new = [n for numbers in step.microbatches for n in numbers]
        assert len(new) == 4 or len(seen) + len(new) == len(sizes)
        seen += new
    assert sorted(seen) == list(range(45))


def test_small_cases_by_hand():
    sizes = [Size(5, 0), Size(6, 3), Size(4, 2), Size(3, 0), Size(2, 0), Size(2, 1)]
    assert all(sum(sizes[i].tiles for i in bin_) <= 3 for bin_ in pack(sizes, 2, 10, 3))
    assert sum(map(len, pack([Size(2, 2)] * 5, 2, 10, 4))) == 4  # two a bin, of five that fit
    # 22 tokens for two bins of 10: the first three (15) are placed, then 3, 2 (18) too. The
    # image of 6 goes to the empty bin, the one of 4 to the bin of fewer tiles: with the text
    # of 5. What is left fills 4 and 1.
    bins = pack(sizes, 2, 10)
    tokens = [sum(sizes[i].tokens for i in chosen) for chosen in bins]
    assert any(0 in chosen for chosen in bins) and max(tokens) <= 10
    assert sum(tokens) >= 18
    assert not any({1, 2} <= set(chosen) for chosen in bins)  # the two heavy images apart
    assert pack([], 2, 10) == [[], []]
    assert pack([Size(10, 1)], 2, 10) in ([[0], []], [[], [0]])
    loads = [Size(10, 8), Size(10, 5), Size(10, 4), Size(10, 1)]
    assert sorted(map(sorted, spread(loads, 2))) == [[0, 3], [1, 2]]
    assert spread([Size(10, 0)] * 4, 4) != [[0, 1, 2, 3]]
    assert [len(s) for s in spread([Size(0, 0)] * 4, 2)] == [2, 2]  # no data left, say


@pytest.mark.parametrize("stop", [1, 3])
def test_a_plan_goes_on_from_its_state(trace, stop):
    first = plan(trace, 8)
    for _ in range(stop):
        first.next_step()
    state = json.loads(json.dumps(first.state_dict()))
    assert state["consumed_samples"] == state["position"] - len(state["held"]) and state["held"]
    second = plan(trace, 8)
    second.next_step()  # of another place, to be forgotten
    second.load_state_dict(state)
    for _ in range(3):
        assert first.next_step() == second.next_step()
    assert first.state_dict() == second.state_dict()


def test_bad_samples_end_the_plan_or_are_left_out(trace):
    sizes = [size if i % 7 else f"rows.jsonl:{i + 1}: bad" for i, size in enumerate(trace[:500])]
    with pytest.raises(DataError, match=r"rows.jsonl:\d+: bad"):
        plan(sizes, 4).next_step()
    made, seen, skipped = plan(sizes, 4, 500, skip_bad=True), [], []
    while len(seen) + len(skipped) < 500:
        step = made.next_step()
        seen += [n for numbers in step.microbatches for n in numbers]
        skipped += step.skipped
        assert made.state_dict()["consumed_samples"] <= 500
    assert len(skipped) == len(set(skipped)) == 72 and len(set(seen)) == 428
    with pytest.raises(DataError, match=f"{MAX_BAD_RUN} rows one after the other are bad"):
        plan(["rows.jsonl:1: bad"], 4, skip_bad=True).next_step()

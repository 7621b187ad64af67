"""Routes of both hops: recorded, replayed exactly, and refused where they cannot be."""

from __future__ import annotations

import pytest
import torch

from megatron_mm.model.routing import NOT_HANDED
from support.cascades import HARD, all_or_nobody, cascade_run, move_off_zero
from support.invariance import LAYOUTS
from support.layouts import parallel_config
from support.routes import record_and_replay, refusal

CASCADED = (0, 2, 3)  # the layer 1 is a plain E


def recorded(ranks, layout: str | None, multiple: int | None = None) -> list:
    size, sizes = (1, {}) if layout is None else LAYOUTS[layout]
    run, parallel = cascade_run(**HARD), parallel_config(**sizes)
    return ranks(size, record_and_replay, run, parallel, multiple, move_off_zero)


@pytest.fixture(scope="module")
def one_rank(ranks):
    """By multiple of padding, what one rank records and replays."""
    return {multiple: recorded(ranks, None, multiple)[0] for multiple in (1, 2)}


def test_a_replay_of_the_own_routes_changes_no_bit(one_rank):
    routes, _, replayed, logits, again = one_rank[1]
    assert all(torch.equal(a, b) for a, b in zip(logits, again, strict=True))
    for taken, repeated in zip(routes, replayed, strict=True):
        for index, rows in taken.items():
            assert rows.dtype == torch.int16 and torch.equal(rows, repeated[index])
            second = rows[:, 2:]
            assert ((second == NOT_HANDED).all(1) | (second >= 0).all(1)).all()
            handed = (second >= 0).any(1).sum()
            assert 0 < handed < len(rows) if index in CASCADED else not handed


@pytest.mark.parametrize("layout", ["TP2", "EP2", "CP2", "PP2xVPP2", "TP2xPP2xEP2"])
def test_records_are_whole_and_replayed_by_changed_routers(ranks, one_rank, layout):
    """All routers are moved before the second replay, and with them who would be handed over."""
    sizes = LAYOUTS[layout][1]
    expected = one_rank[sizes.get("tp", 1) * sizes.get("cp", 1)][0]
    dp = 2 if layout == "EP2" else 1
    for rank, (routes, changed, replayed, *_) in enumerate(recorded(ranks, layout)):
        for mine, theirs in zip(routes, expected[rank % dp :: dp], strict=True):
            assert mine.keys() == theirs.keys()
            for index in mine:
                for hop in (slice(2), slice(2, None)):  # as sets, see test_routes.py
                    ours, others = (rows[index][:, hop].sort(1).values for rows in (mine, theirs))
                    assert torch.equal(ours, others)
        different = 0
        for taken, again, other in zip(routes, replayed, changed, strict=True):
            for index, rows in taken.items():
                assert torch.equal(rows, again[index])
                different += int((rows[:, 2:] != other[index][:, 2:]).sum())
        assert different


@pytest.mark.parametrize(
    ("layer", "row", "words"),
    [
        (0, [0, 1, 4, 4], "position 3: [0, 1, 4, 4]; a row names 2 different experts from 0 to 5"),
        (0, [0, 1, 4, -2], "is -1, or -2 (not handed over) throughout"),
        (0, [0, 1, -1, -2], "position 3: [0, 1, -1, -2]"),
        (0, [0, 1, 6, 2], "position 3: [0, 1, 6, 2]"),
        (0, [-2, -2, 1, 2], "position 3: [-2, -2, 1, 2]"),
        (1, [0, 1, 2, 3], "in the other 2 is -1, or -2 (not handed over) throughout"),
    ],
)
def test_routes_that_cannot_be_replayed_are_refused(ranks, layer, row, words):
    from support.batches import microbatch

    run = cascade_run(**HARD)
    run.parallel = parallel_config()
    tokens = len(microbatch(run.model, 5, (1,)).tokens_T)
    free = torch.full((tokens, 4), -1, dtype=torch.int16)
    routes = {index: free.clone() for index in range(4)}
    routes[layer][3] = torch.tensor(row)
    message = ranks(1, refusal, run, routes)[0]
    assert words in message and "\n" not in message


def test_routes_of_a_model_without_a_second_hop_are_refused(ranks):
    """A record of another width is another model's."""
    run = cascade_run(**HARD)
    batch = all_or_nobody(run, 1)[0]
    narrow = {index: rows[:, :2] for index, rows in batch.routes.items()}
    message = ranks(1, refusal, run, narrow)[0]
    assert "routes of layer 0 have shape" in message and "with 4 experts each" in message

"""Mixtures: every prefix follows the weights, and each source keeps its own epochs."""

from itertools import accumulate

import numpy as np
import pytest

from megatron_mm.config import ConfigError, validate
from megatron_mm.config.settings import DataPhase, DataSource
from megatron_mm.data.loading.loader import TrainLoader
from megatron_mm.data.loading.order import MAX_PERIOD, Deal, Order, PhaseSize, whole_parts
from megatron_mm.data.loading.shuffle import RowGroup, shuffled
from megatron_mm.errors import DataError


@pytest.mark.parametrize(
    "weights",
    [[3, 1], [1], [1, 1, 1], [0.7, 0.2, 0.1], [5, 0, 2], [1, 2, 3, 5, 8, 13, 21], [0.01, 0.99]],
)
def test_every_prefix_follows_the_weights(weights):
    deal, drawn = Deal(whole_parts(weights, "x")), [0] * len(weights)
    for slot in range(500):
        source, before = deal.locate(slot)
        assert before == drawn[source]
        drawn[source] += 1
        for count, weight in zip(drawn, weights, strict=True):
            exact = (slot + 1) * weight / sum(weights)
            assert abs(count - exact) < 1 + 1e-9  # the sum of decimal weights is rounded


def test_parts():
    assert whole_parts([3, 1], "x") == (3, 1) and whole_parts([0.5, 0.25], "x") == (2, 1)
    assert whole_parts([0.1, 0.2, 0], "x") == (1, 2, 0)
    fine = whole_parts([1 / 3, 0.4142135, 1e-9], "x")
    assert sum(fine) == pytest.approx(MAX_PERIOD, abs=2) and fine[2] == 1
    assert fine[0] / sum(fine) == pytest.approx((1 / 3) / (1 / 3 + 0.4142135), abs=1 / MAX_PERIOD)
    for weights, what in (
        ([0, 0], "weights are 0, 0; use at least 1 above 0"),
        ([1, -2], "weight -2 is not allowed"),
        ([float("nan")], "weight nan"),
        ([float("inf"), 1], "weight inf"),
    ):
        with pytest.raises(DataError, match=what) as caught:
            whole_parts(weights, "train_data: phase 1")
        assert str(caught.value).startswith("train_data: phase 1: ")


def test_each_source_is_read_in_its_own_epochs():
    order = Order([PhaseSize(([RowGroup(6, 0)], [RowGroup(4, 0)]), (3, 1), None)], seed=5)
    rows = [order.row(n) for n in range(48)]
    first, second = ([row for _, s, row in rows if s == source] for source in (0, 1))
    assert len(first) == 36 and len(second) == 12
    for drawn, size in ((first, 6), (second, 4)):
        epochs = [drawn[i : i + size] for i in range(0, len(drawn), size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1
    backwards = [order.row(n) for n in reversed(range(48))]
    assert backwards[::-1] == rows


def test_a_path_alone_keeps_the_order_it_always_had():
    """Published figures depend on it: numpy's permutation seeded by (seed, phase, epoch)."""
    first, second = [RowGroup(5, 0)], [RowGroup(2, 10), RowGroup(7, 30)]
    order = Order([PhaseSize((first,), (1.0,), 7), PhaseSize((second,), (2.5,), None)], seed=1234)
    for phase, start, size, count in ((0, 0, 5, 7), (1, 7, 9, 20)):
        expected = [
            row
            for epoch in range(3)
            for row in np.random.default_rng([1234, phase, epoch]).permutation(size)
        ]
        assert [order.row(start + n)[2] for n in range(count)] == expected[:count]


def mixed(run, folder, weights, samples=None):
    names = ("align.jsonl", "mix.jsonl")
    sources = [DataSource(str(folder / n), w) for n, w in zip(names, weights, strict=True)]
    run.data.train_data = [DataPhase(samples=samples, mixture=sources)]
    return run


def test_a_mixture_is_loaded_alike_under_any_layout(run, tokenizer, digits_folder):
    mixed(run, digits_folder, (3, 1))
    whole = TrainLoader(run, tokenizer, data_parallel_rank=0, data_parallel_size=1)
    names = [n for _ in range(4) for m in whole.next_batch() for n in m.samples]
    hits = list(accumulate("align" in name for name in names))
    assert all(abs(hit - 0.75 * n) < 1 for n, hit in enumerate(hits, start=1))
    ranks = [
        TrainLoader(run, tokenizer, data_parallel_rank=r, data_parallel_size=2) for r in (0, 1)
    ]
    steps = [[m.samples for m in rank.next_batch()] for rank in ranks]
    assert [n for pair in zip(*steps, strict=True) for part in pair for n in part] == names[:8]
    whole.load_state_dict({"consumed_samples": 8})
    assert [n for m in whole.next_batch() for n in m.samples] == names[8:16]


def test_bad_mixtures(run, tokenizer, digits_folder):
    run.data.train_data = []
    for weights, what in (((0, 0), r"weights is \[0, 0\]"), ((1, -1), "weight is -1")):
        with pytest.raises(ConfigError, match=what):
            validate(mixed(run, digits_folder, weights))
    run.data.train_data[0].path = "a.jsonl"
    with pytest.raises(ConfigError, match="path is 'a.jsonl'; allowed: none beside a mixture"):
        validate(run)
    with pytest.raises(DataError, match="a.jsonl stands beside a mixture"):
        TrainLoader(run, tokenizer, data_parallel_rank=0, data_parallel_size=1)
    run.data.train_data = [DataPhase()]
    with pytest.raises(ConfigError, match=r"train_data\[0\].path is ''"):
        validate(run)


def test_large_blocks_are_shuffled_in_windows():
    """Ten row groups of ten rows, three of which fit: no row lost, each group read once."""
    blocks = [RowGroup(10, 30)] * 10
    rows = shuffled(blocks, np.random.default_rng(0), window_bytes=100)
    assert sorted(rows) == list(range(100))
    windows = [rows[start : start + 30] for start in range(0, 100, 30)]
    groups = [set(window // 10) for window in windows]
    assert [len(group) for group in groups] == [3, 3, 3, 1]
    assert set.union(*groups) == set(range(10))
    assert all(list(w) != sorted(w) and (np.diff(w // 10) != 0).sum() > 9 for w in windows[:3])
    again = shuffled(blocks, np.random.default_rng(1), window_bytes=100)
    assert {*(again[:30] // 10)} != groups[0]
    huge = shuffled([RowGroup(4, 500)] * 3, np.random.default_rng(0), window_bytes=100)
    assert sorted(huge) == list(range(12))
    plain = np.random.default_rng(0).permutation(100)
    assert (shuffled(blocks, np.random.default_rng(0), window_bytes=300) == plain).all()

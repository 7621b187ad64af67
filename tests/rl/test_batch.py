"""Completions as microbatches: labels, shared images, bins."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_mm.config import Memory
from megatron_mm.data.images import TileGrid
from megatron_mm.data.sample import ImageMemory, Sample, SampleImage, Size
from megatron_mm.data.tiles import ImageSettings
from megatron_mm.rl.completion_batch import (
    answered,
    bins_by_name,
    completion_batch,
    token_bins,
)
from megatron_mm.rl.policy_losses import loss_counts, loss_denominator


def prompt(length: int, tiles: int = 0) -> Sample:
    tokens = torch.arange(100, 100 + length)
    images = []
    if tiles:
        pixels = np.random.default_rng(length).integers(0, 255, (tiles, 8, 8, 3), dtype=np.uint8)
        coordinates = torch.rand(16 * tiles, 2)
        chosen = list(range(tiles))
        memories = {"vision": ImageMemory(chosen, coordinates, torch.rand(16 * tiles))}
        images = [SampleImage(pixels, TileGrid(tiles, 1, False), chosen, memories, 1)]
    return Sample(tokens, tokens, torch.zeros(length), images, f"rows:{length}")


SETTINGS = dict(pad_id=0, pad_multiple=4)


def test_sampled_positions_are_those_whose_logits_were_drawn_from():
    one, two = torch.tensor([7, 8, 9]), torch.tensor([5])
    samples = [answered(prompt(5), one, None), answered(prompt(3), two, None)]
    batch = completion_batch(samples, [4, 2], settings=None, **SETTINGS)
    assert batch.tokens_T.tolist() == [100, 101, 102, 103, 104, 7, 8, 9, 100, 101, 102, 5]
    assert batch.sampled.tolist() == [4, 5, 6, 10]
    assert batch.labels_T[batch.sampled].tolist() == [7, 8, 9, 5]
    assert batch.completion_T[batch.sampled].tolist() == [0, 0, 0, 1]
    assert (batch.completion_T >= 0).sum() == 4
    assert batch.lengths_N.tolist() == [3, 1] and batch.members == [4, 2]
    spread = batch.spread([torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0])])
    assert spread[batch.sampled].tolist() == [1, 2, 3, 4] and spread.sum() == 10


def test_a_position_weighs_what_a_token_of_its_sample_counts():
    """Three tokens of one completion count 1 together, as one of the other does; padding is 0."""
    samples = [answered(prompt(5), torch.tensor([7, 8, 9]), None)]
    samples += [answered(prompt(2), torch.tensor([5]), None)]
    batch = completion_batch(samples, [0, 1], settings=None, **SETTINGS)
    for mode, limit, each in (
        ("seq-mean-token-mean", 20, [1 / 3, 1.0]),
        ("token-mean", 20, [1.0, 1.0]),
        ("seq-mean-token-sum-norm", 20, [20 / 3, 20.0]),
    ):
        counts_N = loss_counts(mode, batch.lengths_N, limit)
        assert counts_N.sum() == loss_denominator(mode, batch.lengths_N, limit)
        weights = batch.position_weights(counts_N)
        expected = [each[0]] * 8 + [each[1]] * 3 + [0.0]
        assert weights.tolist() == pytest.approx(expected)
    left_out = torch.tensor([3, 0])
    counts_N = loss_counts("seq-mean-token-mean", left_out, 20)
    assert counts_N.tolist() == [1, 0]
    assert loss_counts("token-mean", torch.zeros(0).long(), 20).tolist() == []


def test_a_batch_of_nothing_is_padding():
    batch = completion_batch([], [], settings=None, **SETTINGS)
    assert len(batch.tokens_T) == 4 and not len(batch.sampled)
    assert not batch.spread([]).any() and (batch.completion_T == -1).all()


def test_completions_of_a_prompt_share_its_image():
    asked, other = prompt(40, tiles=2), prompt(50, tiles=1)
    samples = [answered(p, torch.tensor([1, 2]), None) for p in (asked, asked, other)]
    memory = Memory("vision", "tiles", 16, 4, True, "images")
    settings = ImageSettings(8, 2, 2, 4, None, False, "all", (memory,), (0.5,) * 3, (0.5,) * 3)
    batch = completion_batch(samples, [0, 1, 2], settings=settings, **SETTINGS)
    assert len(batch.pixels_NCHW) == 3
    assert batch.stream_tiles.tolist() == batch.memories["vision"].tiles.tolist() == [0, 1, 0, 1, 2]


def sizes(tokens: list[int], tiles: list[int] | None = None) -> list[Size]:
    return [*map(Size, tokens, tiles or [0] * len(tokens))]


def test_bins_hold_what_fits_and_keep_neighbours_together():
    assert token_bins(sizes([4, 4, 4, 4, 4]), 8) == [[0, 1], [2, 3], [4]]
    assert token_bins(sizes([6, 4, 2, 4]), 8) == [[0, 2], [1, 3]]
    assert token_bins(sizes([20, 3]), 8) == [[0], [1]]
    assert token_bins([], 8) == []
    assert token_bins(sizes([1, 1, 1, 1], [2, 3, 1, 9]), 8, 4) == [[0, 2], [1], [3]]
    assert token_bins(sizes([6, 4, 2], [0, 0, 5]), 8, 5) == [[0, 2], [1]]


def test_completions_of_one_prompt_count_its_tiles_once():
    four = sizes([2, 2, 2, 2], [3, 3, 3, 3])
    assert token_bins(four, 8, 4) == [[0], [1], [2], [3]]
    assert token_bins(four, 8, 4, [0, 0, 1, 1]) == [[0, 1], [2, 3]]
    assert token_bins(four, 8, 6, [0, 0, 1, 1]) == [[0, 1, 2, 3]]
    assert token_bins(four, 8, 2, [0, 0, 1, 1]) == [[0, 1], [2, 3]]  # beyond the limit, but alone
    found = bins_by_name(["a", "b"], ["b", "a", "b", "b"], four, 8, 4, [7, 8, 7, 9])
    assert found == [[[1]], [[0, 2], [3]]]


def test_bins_of_names_hold_their_own():
    found = bins_by_name(["a", "b", "c"], ["b", "a", "b", "b"], sizes([4, 4, 4, 4]), 8)
    assert found == [[[1]], [[0, 2], [3]], []]

"""The most tiles of an image, which plans and splits are made for, are those that a reader cuts."""

from __future__ import annotations

from itertools import product

import pytest

from megatron_mm.config import load
from megatron_mm.config.cost import costs
from megatron_mm.config.memories import most_tiles
from megatron_mm.config.vision_parallel import chosen
from megatron_mm.data.tiles import choose_grids, image_settings
from megatron_mm.errors import DataError
from megatron_mm.perf.assumed import planned_batch

STREAMS, MEMORIES = ("none", "thumbnail", "tiles", "all"), ("none", "thumbnail", "tiles", "pyramid")


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_wide_image_is_cut_into_as_many(stream, memory):
    run = load(argv=["--preset", "mm-80b"])
    run.model.fusion.image_stream, run.model.fusion.vision_memory = stream, memory
    compared = 0
    for budget, thumbnail, most in product((256, 512, 1024, 3000, None), (True, False), (1, 4, 12)):
        run.data.max_image_tokens, run.data.use_thumbnail = budget, thumbnail
        run.data.max_num_tiles = most
        try:
            settings = image_settings(run)
        except DataError:  # a thumbnail that is never made
            continue
        for images in (1, 2, 3):
            found = most_tiles(run, images)
            try:
                grids = choose_grids([(448 * 50, 448)] * images, settings, "row")
            except DataError:  # too much at 1 tile each
                assert found == 1
                continue
            assert [(grid.rows, grid.cols) for grid in grids] == [(1, found)] * images
            compared += 1
    assert compared >= 30


def test_plans_and_splits_follow_the_budget():
    """A budget is planned like the `max_num_tiles` that it leaves."""
    flags = ["--preset", "mm-80b", "--bf16", "--global-batch-size", "8"]
    flags += ["--pipeline-model-parallel-size", "4"]
    budget = load(argv=[*flags, "--max-image-tokens", "1024"])
    tiles = load(argv=[*flags, "--max-num-tiles", "3"])
    assert most_tiles(budget) == 3 and costs(budget) == costs(tiles)
    assert planned_batch(budget).pixels_NCHW.shape == planned_batch(tiles).pixels_NCHW.shape
    assert chosen(budget) == chosen(tiles)

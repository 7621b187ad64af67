"""The encoder beside the pipeline: same loss and gradients as in the first stage of one rank."""

from __future__ import annotations

from functools import partial

import pytest

from megatron_mm.data.batch import Dealt
from megatron_mm.engine.engine import Engine
from support.batches import microbatch
from support.invariance import BROKEN, LAYOUTS, RECOMPUTE, compare, invariance_run, worst
from support.layouts import parallel_config, step_gradients

BESIDE = dict(vision_parallel="replica")
TEXT = ((0, 0), (0,), (0, 0), (0,))
# One microbatch has all the images; four ranks share three tiles, so one of them has none.
ONE_IMAGE = ((0, 0), (1,), (0,), (0,))


def beside(**sizes):
    return parallel_config(**sizes, **BESIDE)


def of(images, run, multiple):
    return [microbatch(run.model, seed, these, multiple) for seed, these in enumerate(images)]


@pytest.fixture(scope="module")
def reference(ranks):
    """By multiple of padding, the encoder a part of the only stage."""
    return {
        multiple: ranks(1, step_gradients, invariance_run(), parallel_config(), None, multiple)[0]
        for multiple in (1, 2, 4)
    }


def multiple_of(sizes: dict) -> int:
    return sizes.get("tp", 1) * sizes.get("cp", 1)


@pytest.mark.parametrize(
    "name",
    [
        "TP2", "CP2", "PP2", "PP4", "PP2xVPP2", "DP2", "EP2", "TP2xPP2", "TP2xCP2", "PP2xDP2",
        "TP2xPP2xEP2", "PP2xCP2xEP2", "PP2xVPP2xCP2",
    ],
)  # fmt: skip
def test_gradients_do_not_depend_on_the_layout(ranks, reference, name):
    size, sizes = LAYOUTS[name]
    found = ranks(size, step_gradients, invariance_run(), beside(**sizes))[0]
    compare(found, reference[multiple_of(sizes)])


@pytest.mark.parametrize("name", ["TP2", "TP2xPP2", "TP2xCP2"])
def test_an_encoder_whole_on_every_rank(ranks, reference, name):
    """Tensor-parallel ranks share the tiles in place of the linears."""
    size, sizes = LAYOUTS[name]
    parallel = beside(**sizes, vision_tensor_parallel_size=1)
    compare(
        ranks(size, step_gradients, invariance_run(), parallel)[0], reference[multiple_of(sizes)]
    )


@pytest.mark.parametrize("recompute", ["full", "all modules"])
def test_recompute_changes_nothing(ranks, reference, recompute):
    run = invariance_run(**RECOMPUTE[recompute])
    compare(ranks(2, step_gradients, run, beside(pp=2))[0], reference[1])


@pytest.mark.parametrize("images", [TEXT, ONE_IMAGE])
def test_steps_with_few_images_or_none(ranks, images):
    batches = partial(of, images)
    run = invariance_run()
    expected = ranks(1, step_gradients, run, parallel_config(), None, 1, batches)[0]
    compare(ranks(4, step_gradients, run, beside(pp=4), None, 1, batches)[0], expected)


@pytest.mark.parametrize(
    "frozen",
    [
        dict(freeze_vision=True),
        dict(freeze_vision=True, freeze_projector=True, freeze_clvr=True),
        dict(freeze_language=True),
    ],
)
def test_frozen_modules(ranks, frozen):
    run = invariance_run(**frozen)
    expected = ranks(1, step_gradients, run, parallel_config())[0]
    compare(ranks(2, step_gradients, run, beside(pp=2))[0], expected)


def send_nothing_back(engine: Engine) -> None:
    engine.encoder.backward = lambda: None


def reduce_nothing(engine: Engine) -> None:
    engine.encoder.ddp.finish_grad_sync = lambda *_, **__: None


def scale_nothing(engine: Engine) -> None:
    engine.encoder.ddp.scale_gradients = lambda *_: None


@pytest.mark.parametrize("sabotage", [send_nothing_back, reduce_nothing, scale_nothing])
def test_a_forgotten_step_is_noticed(ranks, reference, sabotage):
    _, broken = ranks(2, step_gradients, invariance_run(), beside(pp=2), sabotage)[0]
    error, parameter = worst(broken, reference[1][1])
    assert error > BROKEN and parameter.startswith("vision.")


def test_tiles_are_dealt_evenly():
    """Over any microbatches that follow each other the shares differ by one tile at most."""
    counts = [13, 0, 1, 7, 40, 2]
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    dealt = [Dealt(first, count) for first, count in zip(firsts, counts, strict=True)]
    for owners in (1, 3, 16):
        for begin in range(len(dealt)):
            shares = [sum(len(d.of(r, owners)) for d in dealt[begin:]) for r in range(owners)]
            assert max(shares) - min(shares) <= 1 and sum(shares) == sum(counts[begin:])
        tiles = [tile for owner in range(owners) for tile in dealt[3].of(owner, owners)]
        assert sorted(tiles) == [*range(7)]

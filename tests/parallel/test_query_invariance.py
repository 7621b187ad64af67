"""Glimpses: the same loss and gradients on every layout, with everything that starts at zero away
from it, two pairs that cross boundaries, boxes for half of the queries, and a query and its slots
on different ranks."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megatron_mm.config import RunConfig
from megatron_mm.config.layers.queries import query_settings
from megatron_mm.model.layers import glimpse
from support.batches import small_run
from support.invariance import BROKEN, LAYOUTS, RECOMPUTE, compare, invariance_run, worst
from support.layouts import (
    detach_memory_on_the_wire,
    forget_reduction,
    parallel_config,
    step_gradients,
    steps_batches,
)

# A glimpse waits over a boundary of every pipeline; a look waits with it.
PATTERN = "GE Q *E L Q GE V J *E V"


def query_run(**training) -> RunConfig:
    run = small_run(PATTERN, vision_memory="pyramid")
    settings = query_settings(run.model)
    settings.query_box_loss_coeff, settings.query_first_scale = 0.5, 0.28  # some are above it
    return invariance_run(run, **training)


@pytest.fixture(scope="module")
def reference(ranks):
    """By multiple of padding."""
    return {
        multiple: ranks(1, step_gradients, query_run(), parallel_config(), None, multiple)[0]
        for multiple in (1, 2, 4)
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_do_not_depend_on_the_layout(ranks, reference, name):
    """Packed, with a microbatch of text alone."""
    size, sizes = LAYOUTS[name]
    found = ranks(size, step_gradients, query_run(), parallel_config(**sizes))[0]
    compare(found, reference[sizes.get("tp", 1) * sizes.get("cp", 1)])


def test_a_query_is_the_last_token_of_a_shard_and_slots_lie_on_both_sides():
    """So the layouts above gather queries, and hand slots out, over boundaries of ranks."""
    slots, apart, split = query_settings(query_run().model).slots, 0, 0
    for batch in steps_batches(query_run(), 4):
        edge = len(batch.tokens_T) // 4
        for position in batch.queries.positions_N.tolist():
            apart += position // edge != (position + 1) // edge
            split += (position + 1) // edge != (position + slots) // edge
    assert apart and split


def test_everything_learns(reference):
    _, gradients = reference[1]
    names = [name for name in gradients if ".queries." in name]
    assert len(names) == 2 * 10 and not any(name.endswith("min_scale") for name in names)
    for name in names:
        assert gradients[name].norm() > 0, name


@pytest.mark.parametrize("name", ["one", "PP2xVPP2"])
def test_recompute_changes_nothing(ranks, reference, name):
    size, sizes = {"one": (1, {}), **LAYOUTS}[name]
    run = query_run(**RECOMPUTE["full, odd blocks"])
    compare(ranks(size, step_gradients, run, parallel_config(**sizes))[0], reference[1])


def _leave_rows_where_they_are(engine) -> None:
    glimpse.both_ways = lambda x, group: x


def _forget_slots_of_other_ranks(engine) -> None:
    glimpse.copy_to_tensor_model_parallel_region = lambda x, group: x


def _mend() -> None:
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    from megatron_mm.parallel.sequence import both_ways

    glimpse.both_ways = both_ways
    glimpse.copy_to_tensor_model_parallel_region = copy_to_tensor_model_parallel_region


def _broken(run, parallel, sabotage):
    try:
        return step_gradients(run, parallel, sabotage)
    finally:
        _mend()  # the rank lives on


@pytest.mark.parametrize(
    ("name", "sabotage"),
    [
        ("TP2", _leave_rows_where_they_are),
        ("CP4", _leave_rows_where_they_are),
        ("TP2", _forget_slots_of_other_ranks),
        *(
            ("TP2", partial(forget_reduction, suffix=suffix))
            for suffix in (
                "queries.0.query_norm.weight",
                "queries.0.linear_place.weight",
                "queries.0.linear_place.bias",
                "queries.0.q_norm.weight",
                "queries.0.k_norm.weight",
            )
        ),
        ("PP2", partial(detach_memory_on_the_wire, only="vision")),
    ],
)
def test_a_lost_exchange_is_noticed(ranks, reference, name, sabotage):
    size, sizes = LAYOUTS[name]
    _, broken = ranks(size, _broken, query_run(), parallel_config(**sizes), sabotage)[0]
    expected = reference[sizes.get("tp", 1) * sizes.get("cp", 1)][1]
    assert max(worst(broken, expected)[0], float(broken["replicas"])) > BROKEN


def test_a_text_only_step_has_gradients_of_zero(ranks):
    """Every parameter takes part, so that no rank waits for a gradient that never comes."""
    _, gradients = ranks(2, step_gradients, query_run(), parallel_config(tp=2), None, None, text)[0]
    for name, value in gradients.items():
        if ".queries." in name:
            assert not value.any(), name


def text(run, pad_multiple):
    from support.batches import microbatch

    return [microbatch(run.model, seed, (0, 0), pad_multiple) for seed in range(4)]


def test_the_box_loss_pulls_places_towards_the_boxes(ranks, reference):
    """Its gradient is there on one rank: without boxes, the bias of the place learns otherwise."""
    run = query_run()
    query_settings(run.model).query_box_loss_coeff = 0.0
    _, without = ranks(1, step_gradients, run, parallel_config(), None, 1)[0]
    name = "language.queries.1.linear_place.bias"
    assert not torch.allclose(without[name], reference[1][1][name])

"""Launches and host waits stay below their bounds (support/gpu_bounds.py), at any depth."""

from __future__ import annotations

import pytest

from megatron_mm.parallel import groups
from support.gpu_bounds import BOUNDS, DEEP, SHALLOW, broken
from tools.fake_gpu import install
from tools.fake_gpu.measure import measure, measured_run, table


def on_rank_measure(size: dict):
    gpu = install()
    run = measured_run(**size)
    return measure(gpu, run, groups.build(run.parallel))


@pytest.fixture(scope="module")
def measured(gpu_ranks):
    return {name: gpu_ranks(1, on_rank_measure, size)[0] for name, size in SIZES.items()}


SIZES = {"shallow": SHALLOW, "deep": DEEP}


@pytest.mark.parametrize("depth", SIZES)
def test_no_bound_is_broken(measured, depth):
    found = measured[depth]
    assert broken(found) == [], found.training.waits.by("what", "label", "site")


def test_bounds_are_of_every_part(measured):
    found = measured["deep"]
    assert set(found.layers) | {"other"} == set(BOUNDS)
    assert found.layers["MixtureOfExperts"] == 4 and found.layers["GatedDeltaNet"] == 2


def test_no_layer_waits(measured):
    """Two more of each kind of layer add no wait in the passes or in what follows them."""
    shallow, deep = measured["shallow"], measured["deep"]
    for part in ("training", "update"):
        grown = getattr(deep, part).waits.total() - getattr(shallow, part).waits.total()
        assert grown == 0
    assert set(deep.training.waits.by("label")) <= {"other"}


def test_the_table_has_a_row_for_every_part(measured):
    found = measured["deep"]
    rows = [row.strip("| ").split(" | ") for row in table(found).splitlines()[2:]]
    names = [row[0].strip("`") for row in rows]
    assert names == [*found.layers, "other", "parameters", "gradient norm", "update"]
    by_label = found.training.launches.by("label", "backward")
    experts = rows[names.index("MixtureOfExperts")]
    assert float(experts[1]) == by_label["MixtureOfExperts", False] / 4
    assert float(experts[3]) == 0

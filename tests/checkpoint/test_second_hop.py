"""A second hop is added to a model without one, taken away, and goes on exactly where it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_mm.config.layers.cascade import CascadeSettings
from support.cascades import with_cascade
from support.checkpoint_runs import (
    assert_same,
    attempt,
    interrupted,
    load_whole,
    tiny_run,
    train_and_save,
    weights,
)

PLAIN, CASCADE = "GE L *E J", "GC L *C J"
COPIES = {
    "inner.delegate.router.weight": "inner.router.weight",
    "inner.delegate.norm.weight": "norm.weight",
}


def cascade_run(parallel: dict | None = None, **settings):
    return with_cascade(tiny_run(parallel), CASCADE, **settings)


@pytest.fixture(scope="module")
def plain(ranks, tmp_path_factory):
    """(folder, whole tensors) of a model without a second hop."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, ranks(2, train_and_save, tiny_run(dict(ep=2), pattern=PLAIN), folder)[0]


@pytest.mark.parametrize(("size", "parallel"), [(1, {}), (2, dict(pp=2)), (2, dict(tp=2))])
def test_it_is_added_and_begins_as_what_it_copies(ranks, plain, size, parallel):
    folder, stored = plain
    state, tensors = ranks(size, load_whole, cascade_run(parallel), folder, True)[0]
    found, stored = weights(tensors), weights(stored)
    added = found.keys() - stored.keys()
    assert sorted(state["initialized"]) == sorted(added)
    assert len(added) == 2 * 6 and all(".moe.inner.delegate." in name for name in added)
    for name, tensor in stored.items():
        assert torch.equal(found[name], tensor), name
    for name in added:
        end = next((end for end in COPIES if name.endswith(end)), None)
        if end is not None:
            source = name.removesuffix(end) + COPIES[end]
            assert torch.equal(found[name], stored[source]) and stored[source].any(), name
        elif name.endswith(("scale", "hard", "bias")):
            assert not found[name].any(), name


def cascade_saved(folder: Path) -> dict:
    return train_and_save(cascade_run(), folder)


def test_it_can_be_left_behind(ranks, tmp_path):
    """For the control that starts from the checkpoint that has one."""
    stored = ranks(1, cascade_saved, tmp_path)[0]
    run = tiny_run(pattern=PLAIN)
    _, tensors = ranks(1, load_whole, run, tmp_path, True)[0]
    found = weights(tensors)
    assert not any(".delegate." in name for name in found)
    for name, tensor in found.items():
        assert torch.equal(weights(stored)[name], tensor), name


def test_another_second_hop_is_another_model(ranks, tmp_path):
    """But what only training reads may change."""
    ranks(1, cascade_saved, tmp_path)
    message, same = ranks(1, attempt, cascade_run(delegate_distinct=True), tmp_path, False)[0]
    assert "layers.C.delegate_distinct is False there and True here" in message and same
    trained = dict(delegate_price=0.5, delegate_hard_from=0.0, delegate_planned_share=0.2)
    trained |= dict(delegate_price_warmup=0.25)
    state, _ = ranks(1, load_whole, cascade_run(**trained), tmp_path)[0]
    assert state["iteration"] == 2


def gate_closes(run, folder: Path) -> dict[str, str]:
    """Saves after three of five steps; the gate is hard from the fifth on."""
    run.training.train_iters = 5
    run.model.layers = {"C": CascadeSettings(delegate_hard_from=0.8)}
    return interrupted(run, folder)


@pytest.mark.parametrize(("size", "parallel"), [(1, {}), (2, dict(pp=2)), (2, dict(ep=2))])
def test_a_resumed_run_goes_on_exactly(ranks, tmp_path, size, parallel):
    """Across the step at which the gate becomes hard."""
    for seen in ranks(size, gate_closes, cascade_run(parallel), tmp_path):
        assert seen["loaded"] == seen["saved"] != seen["fresh"]
        assert seen["end again"] == seen["end"] != seen["saved"]


def hard_at_the_end(folder: Path) -> dict:
    run = cascade_run(delegate_hard_from=0.5)
    run.training.train_iters = 2
    return train_and_save(run, folder)


def test_the_gates_state_is_stored_with_the_weights(ranks, tmp_path):
    """Whoever loads them hands over as the run did."""
    stored = weights(ranks(1, hard_at_the_end, tmp_path)[0])
    _, tensors = ranks(1, load_whole, cascade_run(delegate_hard_from=0.5), tmp_path)[0]
    assert_same(weights(tensors), stored)
    hard = [tensor for name, tensor in stored.items() if name.endswith("delegate.hard")]
    assert len(hard) == 2 and all(float(value) == 1.0 for value in hard)

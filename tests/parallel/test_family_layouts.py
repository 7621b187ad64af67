"""The second language family on every kind of layout, in training, and after a resume."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from megatron_mm.checkpoint.compatible import check_model
from megatron_mm.config import RunConfig, to_dict
from megatron_mm.errors import CheckpointError
from support.batches import SMALL_MODELS, small_qwen3_5_moe
from support.checkpoint_runs import interrupted, tiny_run
from support.invariance import BROKEN, compare, invariance_run, worst
from support.invariance import LAYOUTS as ALL
from support.layouts import forget_reduction, parallel_config, step_gradients

LAYOUTS = {
    name: ALL[name]
    for name in (
        *("TP2", "TP4", "CP2", "PP2", "PP2xVPP2", "EP2", "DP2", "TP2xCP2"),
        "TP2xPP2xVPP2xEP2",
    )
}
RESUMED = {"1 rank": (1, {}), "TP2xPP2": (4, dict(tp=2, pp=2)), "EP2": (2, dict(ep=2))}


def family_run(family: str = "qwen3_5_moe") -> RunConfig:
    """Returns the run of test_invariance with a family's small model."""
    run = invariance_run()
    language = SMALL_MODELS[family]().language
    run.model.language = replace(language, init_method_std=run.model.language.init_method_std)
    return run


@pytest.fixture(scope="module")
def reference(ranks):
    """By multiple of padding: a tensor- or context-parallel layout pads its stream."""
    return {
        multiple: ranks(1, step_gradients, family_run(), parallel_config(), None, multiple)[0]
        for multiple in (1, 2, 4)
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_do_not_depend_on_the_layout(ranks, reference, name):
    size, sizes = LAYOUTS[name]
    found = ranks(size, step_gradients, family_run(), parallel_config(**sizes))[0]
    compare(found, reference[sizes.get("tp", 1) * sizes.get("cp", 1)])


def test_its_layers_are_those_of_qwen3_next(ranks, reference):
    """At the same sizes and from the same seed: the same loss and gradients, bitwise."""
    loss, gradients = reference[1]
    other = family_run("qwen3_next")
    expected_loss, expected = ranks(1, step_gradients, other, parallel_config(), None, 1)[0]
    assert loss == expected_loss and gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], value) for name, value in expected.items())


def test_a_lost_tensor_parallel_reduction_is_noticed(ranks, reference):
    suffix = "mixer.inner.out_norm.weight"
    broken = partial(forget_reduction, suffix=suffix)
    _, found = ranks(2, step_gradients, family_run(), parallel_config(tp=2), broken)[0]
    error, parameter = worst(found, reference[2][1])
    assert error > BROKEN and parameter.endswith(suffix)


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_bitwise_identical(ranks, tmp_path, name):
    size, parallel = RESUMED[name]
    run = tiny_run(parallel)
    run.model = small_qwen3_5_moe()
    for rank, seen in enumerate(ranks(size, interrupted, run, tmp_path)):
        assert seen["loaded"] == seen["saved"], f"rank {rank}"
        assert seen["end again"] == seen["end"], f"rank {rank}"
        assert seen["fresh"] != seen["end weights"]


def test_a_checkpoint_of_another_family_is_refused():
    stored = to_dict(SMALL_MODELS["qwen3_next"]())
    with pytest.raises(CheckpointError, match="holds another model: language.mrope_section is"):
        check_model(stored, small_qwen3_5_moe(), finetune=False)
    del stored["language"]["type"], stored["vision"]["type"]  # as saved before there were families
    check_model(stored, SMALL_MODELS["qwen3_next"](), finetune=False)

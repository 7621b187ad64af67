"""Two memories of different resolution, read by different looks: the same gradients on every
layout, and a memory that is detached or taken for the other is noticed."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megatron_mm.config import MemoryConfig, RunConfig
from support.batches import small_run, two_memories
from support.invariance import BROKEN, LAYOUTS, RECOMPUTE, compare, invariance_run, worst
from support.layouts import (
    detach_memory_on_the_wire,
    parallel_config,
    step_gradients,
    swap_memories_of_looks,
    swap_memories_on_the_wire,
)

# Both memories cross the first boundary of every pipeline, and end at different ones.
PATTERN = "GE L *E L GE J *E J L GE J"
READS = ("detail", "overview", "detail")
# Widths alike: a look then takes either memory without an error.
ALIKE = {"overview": MemoryConfig("thumbnail", 32), "detail": MemoryConfig("tiles", 32)}


def memories_run(fusion: dict | None = None, **training) -> RunConfig:
    run = small_run(PATTERN, **(two_memories(*READS) | (fusion or {})))
    return invariance_run(run, **training)


@pytest.fixture(scope="module")
def reference(ranks):
    """By multiple of padding."""
    return {
        multiple: ranks(1, step_gradients, memories_run(), parallel_config(), None, multiple)[0]
        for multiple in (1, 2, 4)
    }


@pytest.mark.parametrize(
    "name", ["TP2", "CP2", "PP2", "PP4", "PP2xVPP2", "DP2", "TP2xPP2xEP2", "PP2xVPP2xCP2"]
)
def test_gradients_do_not_depend_on_the_layout(ranks, reference, name):
    """Packed, with a microbatch of text alone."""
    size, sizes = LAYOUTS[name]
    found = ranks(size, step_gradients, memories_run(), parallel_config(**sizes))[0]
    compare(found, reference[sizes.get("tp", 1) * sizes.get("cp", 1)])


def test_every_memory_and_look_learns(reference):
    _, gradients = reference[1]
    for part in ("memory_projs.overview", "memory_projs.detail"):
        assert gradients[f"vision.{part}.weight"].norm() > 0
    assert gradients["language.looks.1.linear_kv.weight"].shape == (128, 16)
    assert gradients["language.looks.2.linear_kv.weight"].shape == (128, 32)


@pytest.mark.parametrize("name", ["one", "PP2xVPP2"])
def test_recompute_changes_nothing(ranks, reference, name):
    size, sizes = {"one": (1, {}), **LAYOUTS}[name]
    run = memories_run(**RECOMPUTE["full, odd blocks"])
    compare(ranks(size, step_gradients, run, parallel_config(**sizes))[0], reference[1])


def test_an_uneven_split_is_computed_alike(ranks, reference):
    """The first boundary carries one memory, the second both, the third one."""
    layout = "GE | L *E | L GE J *E J | L GE J"
    parallel = parallel_config(pp=4, pipeline_model_parallel_layout=layout)
    compare(ranks(4, step_gradients, memories_run(), parallel)[0], reference[1])


@pytest.mark.parametrize("name", ["overview", "detail"])
def test_a_memory_detached_on_the_wire_is_noticed(ranks, reference, name):
    sabotage = partial(detach_memory_on_the_wire, only=name)
    parallel = parallel_config(pp=2, pipeline_model_parallel_layout="GE | L *E L GE J *E J L GE J")
    _, broken = ranks(2, step_gradients, memories_run(), parallel, sabotage)[0]
    weight = f"vision.memory_projs.{name}.weight"
    expected = reference[1][1][weight]
    assert (broken[weight] - expected).norm() > BROKEN * expected.norm()


def test_another_order_of_memories_on_the_wire_is_noticed(ranks, reference):
    parallel = parallel_config(pp=2, pipeline_model_parallel_layout="GE | L *E L GE J *E J L GE J")
    _, broken = ranks(2, step_gradients, memories_run(), parallel, swap_memories_on_the_wire)[0]
    assert worst(broken, reference[1][1])[0] > BROKEN


def test_looks_that_read_each_others_memory_are_noticed(ranks):
    run = memories_run({"memories": ALIKE})
    _, expected = ranks(1, step_gradients, run, parallel_config())[0]
    _, broken = ranks(1, step_gradients, run, parallel_config(), swap_memories_of_looks)[0]
    assert worst(broken, expected)[0] > BROKEN


def test_one_memory_under_another_name_is_the_same_model(ranks):
    """Names decide where parameters stand, not what is computed: the same values at the start
    give the same loss and gradients, bitwise."""
    pattern = "GE L *E J"
    named = {"vision_memory": "none", "memories": {"detail": MemoryConfig("tiles", 32)}}
    found = []
    for fusion in ({}, named):
        run = small_run(pattern, **fusion)
        found.append(ranks(1, step_gradients, run, parallel_config(), _same_projection)[0])
    (loss, one), (other_loss, other) = found
    assert loss == other_loss
    for name, value in one.items():
        renamed = name.replace("memory_proj.", "memory_projs.detail.")
        assert torch.equal(value, other[renamed]), name


def _same_projection(engine) -> None:
    """A parameter's start follows from its name."""
    g = torch.Generator().manual_seed(11)
    for name, param in engine.chunks[0].named_parameters():
        if "memory_proj" in name:
            param.data.copy_(torch.randn(param.shape, generator=g) * 0.1)

"""Adapters under every split: the gradient of each is the single rank's, and only they have one.

The same comparison as in test_invariance.py, with B away from zero, else A has no gradient. CLVR
and the router train in full beside the adapters; their gradients pass through frozen layers.
"""

from __future__ import annotations

import zlib
from functools import partial

import pytest
import torch

from megatron_mm.config import LoraConfig, RunConfig
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.optimizer import module_of
from megatron_mm.model.layers.lora import is_adapter
from megatron_mm.parallel.param_layout import layouts
from support.batches import small_run
from support.invariance import BROKEN, TOLERANCE, compare, worst
from support.layouts import forget_reduction, parallel_config, step_gradients

TARGETS = ["language", "vision", "projector"]
LAYOUTS = {
    "TP2": (2, dict(tp=2, etp=1)),
    "TP2 with expert-TP2": (2, dict(tp=2)),
    "PP2": (2, dict(pp=2)),
    "EP2": (2, dict(ep=2)),
    "CP2": (2, dict(cp=2)),
    "PP2xVPP2": (2, dict(pp=2, vpp=2)),
    "TP2xPP2": (4, dict(tp=2, pp=2)),
    # Here megatron-core's shared expert gathers and reduces around its linears.
    "TP2, shared expert beside": (2, dict(tp=2, moe_shared_expert_overlap=True)),
}


def lora_run(targets: list[str] = TARGETS, **training) -> RunConfig:
    """Starts from the standard deviation that `invariance_run` explains."""
    run = small_run("GE L *E J")
    run.model.language.init_method_std = run.model.vision.vision_init_method_std = 0.02
    run.lora = LoraConfig(lora_rank=3, lora_alpha=6.0, lora_targets=targets)
    for key, value in training.items():
        setattr(run.training, key, value)
    return run


def b_off_zero(engine: Engine, forget: tuple[str, ...] = ()) -> None:
    """Alike on every layout. `forget`: parameters whose reduction is left out, by suffix."""
    for name, param, layout in layouts(*engine.chunks):
        if name.endswith("lora.b"):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            whole = torch.randn(layout.global_shape, generator=generator) * 0.1
            layout.held(param.data).copy_(whole[layout.block])
    engine.optimizer.reload_model_params()
    if forget:
        forget_reduction(engine, forget)


@pytest.fixture(scope="module")
def reference(ranks):
    return {
        multiple: ranks(1, step_gradients, lora_run(), parallel_config(), b_off_zero, multiple)[0]
        for multiple in (1, 2)
    }


def test_every_linear_of_the_targets_has_an_adapter_and_clvr_none(reference):
    _, gradients = reference[1]
    linears = {name.rpartition(".lora.")[0] for name in gradients if is_adapter(name)}
    language = [f"language.layers.{i}.mixer.inner.{n}" for i, n in (
        (0, "in_proj"), (0, "out_proj"), (1, "linear_qkv"), (1, "linear_proj"),
    )]  # fmt: skip
    language += [f"language.layers.{i}.moe.inner.shared_experts.linear_fc{n}"
                 for i in (0, 1) for n in (1, 2)]  # fmt: skip
    vision = [f"vision.vit.layers.{i}.{n}" for i in (0, 1) for n in (
        "attention.linear_qkv", "attention.linear_proj", "linear_fc1", "linear_fc2",
    )]  # fmt: skip
    projector = [f"vision.projector.linear_fc{n}" for n in (1, 2)]
    assert linears == {*language, *vision, *projector}
    assert all(gradients[f"{linear}.lora.{m}"].any() for linear in linears for m in "ab")


def test_what_is_no_target_follows_its_own_flag(reference):
    """The base of a target is frozen; CLVR and the router, which are none, learn in full."""
    _, gradients = reference[1]
    full = {module_of(name) for name in gradients if name != "replicas" and not is_adapter(name)}
    assert full == {"clvr", "router"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_of_adapters_do_not_depend_on_the_layout(ranks, reference, name):
    size, sizes = LAYOUTS[name]
    found = ranks(size, step_gradients, lora_run(), parallel_config(**sizes), b_off_zero)[0]
    compare(found, reference[sizes.get("tp", 1) * sizes.get("cp", 1)])


@pytest.mark.parametrize("name", ["PP2", "TP2xPP2"])
def test_adapters_in_recomputed_layers_learn_alike(ranks, reference, name):
    """Behind a frozen embedding nothing that enters the first block needs a gradient."""
    size, sizes = LAYOUTS[name]
    run = lora_run(recompute_granularity="full", recompute_num_layers=2)
    found = ranks(size, step_gradients, run, parallel_config(**sizes), b_off_zero)[0]
    compare(found, reference[sizes.get("tp", 1)])


def test_every_lost_reduction_of_an_adapter_is_noticed(ranks, reference):
    """The replicated half of each adapter under sequence parallelism, and nothing else."""
    suffixes = tuple(
        f"{linear}.lora.{half}"
        for half, linears in {
            "a": ("mixer.inner.linear_qkv", "in_proj", "shared_experts.linear_fc1"),
            "b": ("mixer.inner.linear_proj", "out_proj", "shared_experts.linear_fc2"),
        }.items()
        for linear in linears
    )
    broken = partial(b_off_zero, forget=suffixes)
    _, gradients = ranks(2, step_gradients, lora_run(), parallel_config(tp=2), broken)[0]
    _, expected = reference[2]
    names = expected.keys() - {"replicas"}
    errors = {name: worst({name: gradients[name]}, {name: expected[name]})[0] for name in names}
    forgotten = {name for name in names if name.endswith(suffixes)}
    assert len(forgotten) == 8
    assert min(errors[name] for name in forgotten) > BROKEN
    assert max(errors[name] for name in names - forgotten) <= TOLERANCE

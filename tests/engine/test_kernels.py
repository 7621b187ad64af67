"""How a process computes: cuDNN's attention is off, and deterministic_mode is held to."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import sys
import types

import pytest
import torch

from megatron_mm.config import ConfigError, ParallelConfig
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.kernels import choose_kernels
from megatron_mm.model.backends import choice
from megatron_mm.model.core_config import language_config
from megatron_mm.model.layers.gdn.mix import convolve_and_scan
from megatron_mm.parallel import groups
from megatron_mm.train.sft import SupervisedFineTuning
from support.batches import microbatch, small_run

VARIABLES = ("NCCL_ALGO", "CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO")


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """torch's switches and the environment as they were."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


def deterministic_run():
    run = small_run()
    run.backend.deterministic_mode = True
    return run


def test_by_default_only_cudnns_attention_is_off():
    choose_kernels(small_run())
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert not any(name in os.environ for name in VARIABLES)


def test_deterministic_mode_asks_everybody():
    choose_kernels(deterministic_run())
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert [os.environ[name] for name in VARIABLES] == ["Ring", ":4096:8", "0"]
    assert language_config(deterministic_run()).deterministic_mode
    assert not language_config(small_run()).deterministic_mode


@pytest.mark.parametrize(
    ("name", "fine", "bad"),
    [
        ("NCCL_ALGO", "^NVLS", "NVLS"),
        ("CUBLAS_WORKSPACE_CONFIG", ":16:8", ":0:0"),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0", "1"),
    ],
)
def test_the_environment_is_kept_or_refused(monkeypatch, name, fine, bad):
    monkeypatch.setenv(name, fine)
    choose_kernels(deterministic_run())
    assert os.environ[name] == fine
    monkeypatch.setenv(name, bad)
    with pytest.raises(ConfigError, match=f"{name} is '{bad}' in the environment; allowed with"):
        choose_kernels(deterministic_run())


def test_the_delta_rule_is_torchs(monkeypatch):
    monkeypatch.setattr(choice, "missing_fla", lambda: None)
    settings = deterministic_run().backend
    assert choice.choose(settings).mix is convolve_and_scan
    settings.deterministic_mode = False
    assert choice.choose(settings).mix is not convolve_and_scan


@pytest.mark.parametrize(
    ("kernel", "deterministic", "gpu", "installed", "warned"),
    [
        ("auto", False, True, False, True),
        ("auto", False, True, True, False),
        ("auto", False, False, False, False),
        ("torch", False, True, False, False),
        ("auto", True, True, False, False),
    ],
)
def test_a_gpu_without_flash_linear_attention_is_a_warning_with_its_price(
    monkeypatch, caplog, kernel, deterministic, gpu, installed, warned
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if installed and name == "fla" else None
    )
    monkeypatch.setattr(logging.getLogger("megatron_mm"), "propagate", True)
    run = small_run()
    run.backend.gdn_kernel, run.backend.deterministic_mode = kernel, deterministic
    with caplog.at_level(logging.WARNING):
        choose_kernels(run)
    said = [r.getMessage() for r in caplog.records if "delta rule" in r.getMessage()]
    assert len({*said}) == warned
    if warned:
        assert "flash-linear-attention is not installed: pip install" in said[0]
        assert "1.2 times as long" in said[0] and "tools/plan.py predicts" in said[0]
        assert "\n" not in said[0]


@pytest.mark.parametrize(
    ("capability", "triton_version", "tilelang", "works"),
    [
        ((9, 0), "3.6.0", False, False),
        ((9, 0), "3.6.0", True, True),
        ((9, 0), "3.7.1", False, True),
        ((9, 0), "3.3.1", False, True),
        ((8, 0), "3.6.0", False, True),
        ((10, 0), "3.6.0", False, True),
    ],
)
def test_flash_linear_attention_where_its_backward_pass_is_refused(
    monkeypatch, capability, triton_version, tilelang, works
):
    """Training would end in the first backward pass, after rollouts that work."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name == "fla" else find(name)
    )
    stand_in = types.ModuleType("triton")
    stand_in.__version__ = triton_version
    monkeypatch.setitem(sys.modules, "triton", stand_in)
    backend = types.ModuleType("tilelang")
    backend.CommonTileLangBackend = type(
        "CommonTileLangBackend",
        (),
        {"is_available": lambda self: tilelang, "is_enabled": lambda self: True},
    )
    for name in ("fla", "fla.ops", "fla.ops.common", "fla.ops.common.backends"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.common.backends.tilelang", backend)
    problem = choice.missing_fla()
    assert (problem is None) == works
    if problem is not None:
        assert "on Hopper with Triton 3.6.0 (allowed: below 3.4.0, from 3.7.1)" in problem
        assert "pip install 'tilelang[nvcc]'" in problem and "\n" not in problem


@pytest.mark.parametrize(("version", "works"), [("0.5.2", False), ("0.6.0", True), (None, True)])
def test_an_older_flash_linear_attention_is_not_used(monkeypatch, version, works):
    """It lacks the module of the convolution: the first forward pass would end in a traceback."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    find, held = importlib.util.find_spec, importlib.metadata.version

    def of(name: str) -> str:
        if name != "flash-linear-attention":
            return held(name)
        if version is None:  # a checkout on PYTHONPATH
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", of)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name == "fla" else find(name)
    )
    problem = choice.missing_fla()
    assert (problem is None) == works
    assert works or "flash-linear-attention is 0.5.2; allowed: 0.6 or newer" in problem


def on_rank_gradients(deterministic: bool) -> dict[str, torch.Tensor]:
    run = small_run()
    run.backend.deterministic_mode = deterministic
    run.parallel = ParallelConfig(expert_model_parallel_size=torch.distributed.get_world_size())
    try:
        choose_kernels(run)
        engine = Engine.create(run, groups.build(run.parallel))
        engine.forward_backward([microbatch(run.model, 1)], SupervisedFineTuning())
        return {name: p.main_grad.clone() for name, p in engine.chunks[0].named_parameters()}
    finally:
        torch.use_deterministic_algorithms(False)
        for name in VARIABLES:
            os.environ.pop(name, None)


@pytest.mark.parametrize("size", [1, 2])
def test_it_is_the_same_model(ranks, size):
    """megatron-core scatters routes and embeds tokens in another way; that sums in another
    order: fp32 steps of 6e-8, over some hundred terms."""
    for usual, repeated in zip(
        *(ranks(size, on_rank_gradients, mode) for mode in (False, True)), strict=True
    ):
        assert usual.keys() == repeated.keys()
        for name, grad in usual.items():
            assert (grad - repeated[name]).norm() <= 1e-5 * grad.norm(), name

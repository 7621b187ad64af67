"""Backends without a GPU: settings in megatron-core's words, refusals, who computes what.

What Transformer Engine computes is checked by tests/gpu/test_gpu_backends.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.transformer import transformer_config

from megatron_mm.config import ConfigError, validate
from megatron_mm.model import multimodal
from megatron_mm.model.backends import choice as backend
from megatron_mm.model.core_config import language_config, vision_config
from megatron_mm.model.layers.gdn.mix import HeadWidths, convolve_and_scan, split_heads
from megatron_mm.model.segments import Segments
from support.batches import aligned_run, microbatch, small_run

RECIPES = ["tensorwise", "delayed", "blockwise", "mxfp8"]

# ---- settings to TransformerConfig ----


@pytest.fixture
def as_if_installed(monkeypatch):
    """megatron-core asks for Transformer Engine's version before it takes FP8 with experts."""
    monkeypatch.setattr(transformer_config, "is_te_min_version", lambda *args, **kwargs: True)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("fp8_format", ["hybrid", "e4m3"])
def test_every_recipe_reaches_megatron_core(as_if_installed, recipe, fp8_format):
    run = aligned_run(recipe)
    run.backend.fp8_format = fp8_format
    amax = (16, "max") if recipe == "delayed" else (1, "most_recent")  # others read none
    run.backend.fp8_amax_history_len, run.backend.fp8_amax_compute_algo = amax
    validate(run)
    config = language_config(run)
    assert (config.fp8, config.fp8_recipe, config.bf16) == (fp8_format, recipe, True)
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == amax
    assert not config.fp8_param, "parameters stay bf16, as checkpoints hold them"
    assert vision_config(run, config, 1).fp8 is None


def test_first_and_last_layers_reach_megatron_core(as_if_installed):
    run = aligned_run("tensorwise")
    run.backend.first_last_layers_bf16 = True
    run.backend.num_layers_at_start_in_bf16 = 2
    validate(run)
    config = language_config(run)
    found = (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16)
    assert config.first_last_layers_bf16 and found == (2, 1)


def test_without_fp8_there_is_none():
    config = language_config(aligned_run())
    assert config.fp8 is None and config.transformer_impl == "transformer_engine"


KERNELS = ("fused_permute", "fused_permute_with_probs", "fused_unpermute")
KERNELS += ("fused_sort_chunks_by_index", "fused_sort_chunks_by_index_with_probs")


@pytest.mark.parametrize(
    "problem, missing, fused",
    [
        (None, None, True),
        ("Transformer Engine does not load", None, False),
        (None, "fused_sort_chunks_by_index", False),  # one of before 2.1
    ],
)
def test_the_dispatcher_sorts_with_transformer_engine_where_it_is(
    monkeypatch, problem, missing, fused
):
    """Whichever layers compute. Its choice of experts is never used: it would ask nobody for
    given, drawn or forbidden ones."""
    monkeypatch.setattr(backend, "missing_transformer_engine", lambda: problem)
    for name in KERNELS:
        kernel = None if name == missing else object()
        monkeypatch.setattr(backend.moe_utils, name, kernel)
    config = language_config(small_run())
    assert config.moe_permute_fusion is fused and not config.moe_router_fusion


def test_without_transformer_engine_the_dispatcher_sorts_in_torch():
    assert not language_config(small_run()).moe_permute_fusion


# ---- the choice ----


def test_local_is_torch():
    chosen = backend.choose(small_run().backend)
    assert chosen.column.__module__ == "megatron_mm.model.layers.linear"
    assert chosen.experts.__module__ == "megatron_mm.model.layers.experts"


def test_a_cpu_gets_the_torch_kernel_and_refuses_the_others():
    settings = small_run().backend
    assert backend.choose(settings).mix is convolve_and_scan
    settings.gdn_kernel = "fla"
    with pytest.raises(ConfigError, match="gdn_kernel is 'fla', but there is no CUDA device"):
        backend.choose(settings)
    with pytest.raises(ConfigError, match="'transformer_engine', but there is no CUDA device"):
        backend.choose(aligned_run().backend)


def test_compile_vision_compiles_every_layer_of_the_vit_and_nothing_else(pg, monkeypatch):
    run = small_run()
    run.backend.compile_vision = True
    with pytest.raises(ConfigError, match="compile_vision is true, but there is no CUDA device"):
        multimodal.build(run, pg)
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    tower = multimodal.VisionTower(run, language_config(run), pg.tp, pg.cp)
    assert compiled == list(tower.vit.layers) and len(compiled) == 2
    run.backend.compile_vision = False
    multimodal.VisionTower(run, language_config(run), pg.tp, pg.cp)
    assert len(compiled) == 2


def test_a_model_asking_for_it_is_refused_before_anything_is_built(pg):
    with pytest.raises(ConfigError, match="no CUDA device; allowed here: local"):
        multimodal.build(aligned_run("tensorwise"), pg)


AS_IF_CUDA = """
import torch
from megatron_mm import platform
platform.install()
from megatron_mm.model.backends import choice as backend
torch.cuda.is_available = lambda: True
print(backend.missing_transformer_engine())
"""


def missing_transformer_engine(*folders) -> str:
    """Runs code as on a machine with a GPU, in a process whose path has those folders first."""
    paths = [f"sys.path.insert(0, {str(folder)!r})" for folder in folders]
    # Only after megatron-core: a broken one stops its import (FileNotFoundError).
    script = AS_IF_CUDA.replace(
        "torch.cuda.is_available =", "\n".join(["import sys", *paths, "torch.cuda.is_available ="])
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return line


# 5 s of CPU time: a process with its imports.
@pytest.mark.slow
def test_missing_transformer_engine_says_how_to_install_it():
    line = missing_transformer_engine()
    assert "not installed" in line and "pip install" in line


# 5 s of CPU time: a process with its imports.
@pytest.mark.slow
def test_half_of_transformer_engine_is_told_from_none(tmp_path):
    """Its wheel without the CUDA part: the import raises FileNotFoundError."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise FileNotFoundError('no libtransformer_engine.so')")
    info = tmp_path / "transformer_engine-2.20.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2\n")
    line = missing_transformer_engine(tmp_path)
    assert "does not load (FileNotFoundError: no libtransformer_engine.so)" in line
    assert "pip install" in line


# ---- what it promises ----


def test_the_precision_is_entered_around_the_stack_and_again_for_every_layer(pg, monkeypatch):
    """Again, because a recomputed layer runs outside of the stack's forward pass."""
    depth, entered = [], []

    @contextlib.contextmanager
    def precision(config, layer):
        entered.append((len(depth), layer))
        depth.append(layer)
        yield
        depth.pop()

    chosen = dataclasses.replace(backend.choose(small_run().backend), precision=precision)
    monkeypatch.setattr(multimodal, "choose", lambda settings: chosen)
    run = small_run("GE L *E J")
    (model,) = multimodal.build(run, pg)
    assert not entered
    model(microbatch(run.model, 1))
    assert entered == [(0, None), (1, 0), (1, 0), (1, 1), (1, 1)]


def test_the_experts_activation_is_the_one_of_our_experts():
    """Gate first, then up: the order in which our stacks lie in one fused product."""
    g = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 5, 8, generator=g)
    probs = torch.rand(5, 1, generator=g)
    found = weighted_bias_swiglu_impl(torch.cat((gate, up), -1), None, probs)
    # fp32, one rounding apart
    torch.testing.assert_close(found, F.silu(gate) * up * probs, rtol=1e-6, atol=1e-7)


def test_heads_are_split_in_the_order_of_the_projection():
    widths = HeadWidths(key=2, value=3, values=2)
    stream = torch.arange(2 * sum(widths.rows)).expand(5, -1)
    query, key, value = split_heads(stream, widths)
    assert query[0].tolist() == [[0, 1], [10, 11]] and key[0].tolist() == [[2, 3], [12, 13]]
    assert value[0].tolist() == [[4, 5, 6], [7, 8, 9], [14, 15, 16], [17, 18, 19]]


def test_boundaries_leave_out_empty_samples():
    """Fused kernels take them from here; some refuse a sample of no tokens."""
    segments = Segments.from_cu_seqlens(torch.tensor([0, 0, 3, 3, 8, 8]))
    assert segments.cu_seqlens.tolist() == [0, 3, 8]
    segments = Segments.from_cu_seqlens(torch.tensor([0, 4, 9]))
    assert segments.cu_seqlens.tolist() == [0, 4, 9]

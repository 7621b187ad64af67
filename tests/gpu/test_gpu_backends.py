"""On a CUDA device: Transformer Engine and flash-linear-attention beside our torch layers.

Errors are norms of differences over norms. How much rounding a layer's output or a gradient
has seen depends on where it stands (in bf16 from 0.2 % to 40 % in this tiny model), so what a
backend may err is measured: our layers in bf16 against our layers in fp32.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from support.batches import aligned_run, microbatch

pytestmark = pytest.mark.gpu

RECIPES = ["tensorwise", "delayed", "blockwise", "mxfp8"]


def needs(module: str):
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed")


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def skip_unless_able(run) -> None:
    """A GPU without the recipe's hardware refuses it; that is tested by its message."""
    from megatron_mm.config import ConfigError
    from megatron_mm.model.backends.transformer_engine import check_device

    try:
        check_device(run.backend)
    except ConfigError as error:
        assert "this GPU cannot" in str(error)
        pytest.skip(str(error))


def pass_of(job, run):
    """(loss, output by layer, gradient by parameter, engine) of one microbatch."""
    from megatron_mm.config import token_multiple
    from megatron_mm.engine.engine import Engine
    from megatron_mm.train.sft import SupervisedFineTuning

    engine = Engine.create(run, job)
    outputs = []
    engine.chunks[0].watch = lambda layer, hidden: outputs.append((layer.kind, hidden.detach()))
    batch = microbatch(run.model, 1, pad_multiple=token_multiple(run))
    parts = engine.forward_backward([batch], SupervisedFineTuning())
    numerator, denominator = parts[0].pair("train/lm_loss")
    grads = {name: p.main_grad.clone() for name, p in engine.chunks[0].named_parameters()}
    return float(numerator / denominator), outputs, grads, engine


def parameters(engine):
    from megatron_mm.parallel.param_layout import layouts

    return {name: (param, layout) for name, param, layout in layouts(engine.chunks[0])}


@needs("transformer_engine")
def test_both_backends_are_one_model_with_one_set_of_keys(job):
    ours = parameters(pass_of(job, aligned_run(transformer_impl="local"))[3])
    theirs = parameters(pass_of(job, aligned_run("tensorwise"))[3])
    assert list(ours) == list(theirs)
    for name, (param, layout) in ours.items():
        assert torch.equal(param, theirs[name][0]), name
        for key in ("global_shape", "local_shape", "offset", "expert"):
            assert getattr(layout, key) == getattr(theirs[name][1], key), (name, key)


@pytest.fixture
def errors(job):
    """Errors of a run against our layers in fp32, and of our layers in bf16."""
    wanted_run = aligned_run(transformer_impl="local")
    wanted_run.training.bf16 = False
    wanted = pass_of(job, wanted_run)

    def of(run):
        loss, outputs, grads, engine = pass_of(job, run)
        layers = [
            difference(hidden[: len(reference)], reference)
            for (_, hidden), (_, reference) in zip(outputs, wanted[1], strict=True)
        ]
        # CLVR's adapter starts at zero: no gradient reaches what is behind it
        some = [name for name, grad in wanted[2].items() if grad.norm() > 0]
        return loss, layers, {n: difference(grads[n], wanted[2][n]) for n in some}, engine

    return of, of(aligned_run(transformer_impl="local"))


@needs("transformer_engine")
def test_bf16_errs_no_more_than_our_layers(errors):
    of, (loss, layers, grads, _) = errors
    te_loss, te_layers, te_grads, _ = of(aligned_run())
    assert te_loss == pytest.approx(loss, rel=5e-3)
    for number, (found, allowed) in enumerate(zip(te_layers, layers, strict=True)):
        assert found < 2 * allowed + 1e-3, number
    for name, allowed in grads.items():
        assert te_grads[name] < 2 * allowed + 1e-3, name


@needs("transformer_engine")
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_stays_near_and_trains(errors, recipe):
    from megatron_mm.config import token_multiple
    from megatron_mm.train.sft import SupervisedFineTuning

    run = aligned_run(recipe)
    skip_unless_able(run)
    run.optimizer.lr = 1e-2
    of, (loss, layers, _, _) = errors
    fp8_loss, fp8_layers, _, engine = of(run)
    assert fp8_loss == pytest.approx(loss, rel=0.05) and fp8_loss != loss
    for number, (found, allowed) in enumerate(zip(fp8_layers, layers, strict=True)):
        # e4m3 keeps 4 bits of bf16's 8: steps are 16 times as long
        assert found < 16 * allowed, number
    grads = {name: p.main_grad for name, p in engine.chunks[0].named_parameters()}
    assert all(grad.isfinite().all() for grad in grads.values())
    # The 8-bit copies of the weights must follow the optimizer: with stale ones the loss of a
    # batch seen again and again would stay where it is.
    batch = microbatch(run.model, 1, pad_multiple=token_multiple(run))
    losses = []
    for _ in range(8):
        engine.update(engine.gradient_norm())
        parts = engine.forward_backward([batch, batch], SupervisedFineTuning())
        numerator, denominator = parts[0].pair("train/lm_loss")
        losses.append(float(numerator / denominator))
    assert losses[-1] < 0.5 * fp8_loss, losses  # our layers: a hundredth


@needs("transformer_engine")
@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_experts_with_rows_that_need_padding(job, recipe):
    from megatron.core.fp8_utils import get_fp8_context

    from megatron_mm.model.backends.transformer_engine import TEGroupedExperts
    from megatron_mm.model.core_config import language_config
    from megatron_mm.model.layers.experts import GroupedExperts
    from megatron_mm.parallel.param_layout import initialize

    run = aligned_run(recipe)
    skip_unless_able(run)
    config = language_config(run)
    sizes = torch.tensor([0, 1, 16, 37, 3, 0])
    rows = torch.randn(57, config.hidden_size, device="cuda", dtype=torch.bfloat16)
    probs = torch.rand(57, device="cuda")
    found = []
    for kind in (GroupedExperts, TEGroupedExperts):
        experts = kind(6, config, pg_collection=job.pg, std=0.1, out_std=0.1)
        initialize(experts, 1)
        experts.cuda()
        x = rows.clone().requires_grad_()
        with get_fp8_context(config, 0):
            out, _ = experts(x, sizes, probs)
        out.float().square().sum().backward()
        found.append([out.detach(), x.grad, experts.gate_up.grad, experts.down.grad])
    for ours, theirs in zip(*found, strict=True):
        assert difference(theirs, ours) < (0.02 if recipe is None else 0.2)


@needs("transformer_engine")
def test_packed_attention(job):
    from megatron_mm.model.backends.transformer_engine import PackedAttention
    from megatron_mm.model.layers.attention import causal_attention
    from megatron_mm.model.segments import Segments

    segments = Segments.from_cu_seqlens(torch.tensor([0, 70, 70, 75, 192]), "cuda")
    for heads, groups, width in ((8, 2, 64), (8, 1, 256)):  # 256 is Qwen3-Next's
        shapes = [(192, heads, width)] + [(192, groups, width)] * 2
        inputs = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes]
        found = []
        for attend in (causal_attention, PackedAttention()):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = attend(*leaves, segments)
            out.float().square().sum().backward()
            found.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for ours, theirs in zip(*found, strict=True):
            assert difference(theirs, ours) < 0.02, (heads, groups, width)


def both_ways(functions, inputs) -> list[list[torch.Tensor]]:
    """Result and gradients of each function."""
    found = []
    for function in functions:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        out.float().square().sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    return found


def test_attention_of_packed_streams(job):
    """torch's kernel for packed streams against rectangles, in bf16."""
    from megatron_mm.model.layers import varlen
    from megatron_mm.model.layers.attention import causal_attention, rectangle_attention
    from megatron_mm.model.segments import Segments

    segments = Segments.from_cu_seqlens(torch.tensor([0, 70, 70, 75, 192]), "cuda")
    for heads, groups, width in ((8, 2, 64), (8, 1, 256)):  # 256 is Qwen3-Next's
        shapes = [(192, heads, width)] + [(192, groups, width)] * 2
        inputs = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes]
        assert varlen.suits(inputs[0])
        ways = [
            lambda *x, way=way: way(*x, segments) for way in (rectangle_attention, causal_attention)
        ]
        for ours, theirs in zip(*both_ways(ways, inputs), strict=True):
            assert difference(theirs, ours) < 0.02, (heads, groups, width)


def test_looks_at_packed_memories(job):
    """Three samples with three images, none and two, and padding rows in the memory: some patches
    are seen by nobody in a round, and the last ones by nobody at all."""
    from megatron_mm.model.layers.clvr import _in_rectangles, _packed
    from megatron_mm.model.memory_map import MemoryMap
    from megatron_mm.model.segments import Segments

    images = [(3, 100, 70), (10, 100, 300), (60, 100, 33), (140, 200, 64), (200, 200, 17)]
    visible = [[since, end] for since, end, patches in images for _ in range(patches)]
    segments = Segments.from_cu_seqlens(torch.tensor([0, 100, 120, 200]), "cuda")
    rows = len(visible) + 3
    coordinates = torch.zeros(len(visible), 2, device="cuda")
    map_ = MemoryMap.build(segments, segments, torch.tensor(visible), coordinates, rows)
    shapes = [(200, 4, 64), (rows, 4, 64), (rows, 4, 64)]
    inputs = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes]
    ways = [lambda *x, way=way: way(*x, map_) for way in (_in_rectangles, _packed)]
    for ours, theirs in zip(*both_ways(ways, inputs), strict=True):
        assert difference(theirs, ours) < 0.02
        blind = (ours == 0).flatten(1).all(1)
        assert torch.equal((theirs == 0).flatten(1).all(1), blind) and blind.any()


def test_compiled_layers_of_the_vit(job):
    """Two numbers of tiles, so that the second one's graph has a free dimension."""
    from megatron_mm.model.core_config import language_config, vision_config
    from megatron_mm.model.families.internvit.model import VisionLayer
    from megatron_mm.parallel.param_layout import initialize

    run = aligned_run()
    run.backend.transformer_impl = "local"
    layer = VisionLayer(run.model.vision, vision_config(run, language_config(run), 1), job.pg.tp)
    initialize(layer, 1)
    layer.cuda()
    found = []
    for compiled in (False, True):
        if compiled:
            layer.compile()
        for tiles in (3, 5):
            g = torch.Generator().manual_seed(tiles)
            x = torch.randn(tiles, 17, run.model.vision.vision_hidden_size, generator=g)
            x = x.to("cuda", torch.bfloat16).requires_grad_()
            layer.zero_grad()
            out = layer(x)
            out.float().square().sum().backward()
            grads = [p.grad.clone() for p in layer.parameters()]
            found.append([out.detach(), x.grad, *grads])
    for eager, compiled in zip(found[:2], found[2:], strict=True):
        for ours, theirs in zip(eager, compiled, strict=True):
            assert difference(theirs, ours) < 0.02


@needs("fla")
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 5e-3), (torch.bfloat16, 0.03)])
def test_the_fused_delta_rule(job, dtype, allowed):
    """fp32 leaves room for TF32, which the fused kernels may multiply in (10 bits)."""
    from megatron_mm.model.layers.gdn.fla import convolve_and_scan_fla
    from megatron_mm.model.layers.gdn.mix import HeadWidths, convolve_and_scan
    from megatron_mm.model.segments import Segments

    torch.manual_seed(0)
    widths, key_heads, tokens = HeadWidths(64, 64, 2), 2, 300
    segments = Segments.from_cu_seqlens(torch.tensor([0, 130, 130, 137, 300]), "cuda")
    inputs = [
        torch.randn(tokens, key_heads * sum(widths.rows), device="cuda", dtype=dtype),
        0.5 * torch.randn(key_heads * sum(widths.rows), 4, device="cuda", dtype=dtype),
        -torch.rand(tokens, 2 * key_heads, device="cuda"),
        torch.rand(tokens, 2 * key_heads, device="cuda", dtype=dtype),
    ]
    found = []
    for mix in (convolve_and_scan, convolve_and_scan_fla):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = mix(*leaves, segments, widths)
        out.float().square().sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert difference(theirs, ours) < allowed


def test_auto_takes_the_fused_kernel_where_it_is_installed(job):
    from megatron_mm.model.backends.choice import choose
    from megatron_mm.model.layers.gdn.fla import convolve_and_scan_fla
    from megatron_mm.model.layers.gdn.mix import convolve_and_scan

    missing = importlib.util.find_spec("fla") is None
    run = aligned_run(transformer_impl="local")
    assert choose(run.backend).mix is (convolve_and_scan if missing else convolve_and_scan_fla)

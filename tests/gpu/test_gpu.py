"""On a CUDA device: the same model, the same numbers, and a bf16 step. Skipped elsewhere."""

from __future__ import annotations

import pytest
import torch

from megatron_mm import platform
from support.batches import microbatch, small_run

pytestmark = pytest.mark.gpu


def test_the_platform_file_redirects_nothing(job):
    assert platform.install() is False
    assert platform.backend() == "nccl"


def test_the_delta_rule_equals_itself_on_the_cpu(job):
    """The gated delta rule is the layer with the least ordinary arithmetic."""
    from megatron_mm.model.layers.gdn.delta_rule import gated_delta_rule

    torch.manual_seed(0)
    shapes = [(2, 150, 4, 16)] * 3 + [(2, 150, 4)] * 2
    inputs = [torch.randn(shape) for shape in shapes]
    inputs[3], inputs[4] = -inputs[3].abs(), inputs[4].sigmoid()
    outs = {}
    for device in ("cpu", "cuda"):
        leaves = [x.detach().to(device, copy=True).requires_grad_() for x in inputs]
        out = gated_delta_rule(*leaves)
        out.square().sum().backward()
        outs[device] = [out.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)]
    for ours, theirs in zip(outs["cuda"], outs["cpu"], strict=True):
        # fp32 in another order of summation; TF32 is off by default in matmuls
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_every_pixel_is_normalised_as_on_the_cpu(job):
    """Bitwise, so that an export's processor and training go on to agree."""
    from megatron_mm.data.images import normalise

    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    scale = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    there = [platform.moved(x, "cuda") for x in (pixels, *scale)]
    assert all(x.device.type == "cuda" for x in there)
    assert torch.equal(normalise(*there).cpu(), normalise(pixels, *scale))


def test_a_bf16_step_is_finite_and_close_to_fp32(job):
    from megatron_mm.engine.engine import Engine
    from megatron_mm.train.sft import SupervisedFineTuning

    losses = {}
    for bf16 in (False, True):
        run = small_run()
        run.training.bf16 = bf16
        engine = Engine.create(run, job)
        parts = engine.forward_backward([microbatch(run.model, 1)], SupervisedFineTuning())
        norm = engine.gradient_norm()
        assert torch.isfinite(torch.tensor(norm)) and norm > 0
        engine.update(norm)
        numerator, denominator = parts[0].pair("train/lm_loss")
        losses[bf16] = float(numerator / denominator)
    # bf16 keeps 8 bits of each activation: about 0.4 % each, averaged over tokens
    assert abs(losses[True] - losses[False]) <= 0.02 * losses[False]


def test_experts_in_one_kernel_equal_the_loop(job):
    """Two of the eight have no row, the last among them."""
    from megatron_mm.model.layers.experts import _Experts
    from megatron_mm.model.layers.row_groups import (
        InOneKernel,
        OneByOne,
        fits_one_kernel,
    )

    device, counts = torch.device("cuda"), [3, 0, 130, 7, 1, 64, 200, 0]
    if not fits_one_kernel(platform.compute_capability(device), torch.bfloat16, 8, (256, 128)):
        pytest.skip("this GPU has no kernel for them")
    torch.manual_seed(0)
    rows = sum(counts)
    shapes = [(rows, 256), (rows,), (8, 2, 128, 256), (8, 256, 128)]
    inputs = [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]
    pushed = torch.randn(rows, 256, device=device, dtype=torch.bfloat16)
    outs = []
    for groups in (InOneKernel(torch.tensor(counts), device), OneByOne(counts)):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = _Experts.apply(*leaves, groups)
        out.backward(pushed)
        outs.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*outs, strict=True):
        assert torch.isfinite(ours).all()
        # Both sum in fp32; each of at most three products in a row rounds to 8 bits.
        assert (ours - theirs).float().norm() <= 0.01 * theirs.float().norm()
    assert not outs[0][3][[1, 7]].any() and not outs[0][4][[1, 7]].any()

"""Moves to the fake GPU, and attention over packed streams there.

A function that starts with `on_rank_` runs on the fake GPU; the test looks at its answer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_mm import platform
from megatron_mm.model.layers.attention import causal_attention
from megatron_mm.model.segments import Segments


def on_rank_data() -> dict:
    """Gives a parameter of the CPU data on the GPU."""
    param = same = torch.nn.Parameter(torch.zeros(3))
    param.mark = "kept"
    param.data = torch.full_like(param.data, 2.0, device="cuda")
    param.square().sum().backward()
    return {
        "the same object": same is param,
        "a parameter": isinstance(param, torch.nn.Parameter),
        "mark": param.mark,
        "devices": [str(param.device), str(param.grad.device)],
        "gradient": param.grad.tolist(),
    }


def test_a_parameter_stays_the_object_that_it_was(gpu_ranks):
    (found,) = gpu_ranks(1, on_rank_data)
    assert found == {
        "the same object": True,
        "a parameter": True,
        "mark": "kept",
        "devices": ["cuda:0", "cuda:0"],
        "gradient": [4.0, 4.0, 4.0],
    }


CUTS = [0, 5, 6, 20]


def inputs() -> list[torch.Tensor]:
    """Query of four heads, key and value of two."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(CUTS[-1], heads, 16, generator=g).bfloat16() for heads in (4, 2, 2)]


def on_rank_packed() -> list[torch.Tensor]:
    """Output and gradients of packed samples in bf16."""
    leaves = [x.cuda().requires_grad_() for x in inputs()]
    out = causal_attention(*leaves, Segments.from_cu_seqlens(torch.tensor(CUTS), "cuda"))
    out.backward(torch.ones_like(out))
    return [x.detach().float().cpu() for x in (out, *(leaf.grad for leaf in leaves))]


def test_packed_attention(gpu_ranks):
    (found,) = gpu_ranks(1, on_rank_packed)
    leaves = [x.float().requires_grad_() for x in inputs()]
    parts = []
    for begin, end in zip(CUTS, CUTS[1:], strict=False):
        one = (x[begin:end].transpose(0, 1) for x in leaves)
        parts.append(F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True))
    wanted = torch.cat([part.transpose(0, 1) for part in parts])
    wanted.backward(torch.ones_like(wanted))
    for mine, theirs in zip(found, (wanted, *(leaf.grad for leaf in leaves)), strict=True):
        # Computed in fp32, rounded to 8 bits at the end; backward from such an output.
        assert (mine - theirs).norm() <= 2**-8 * theirs.norm()


def on_rank_way_back() -> list[float]:
    """A copy to the CPU is filled when it returns: read too early it would be NaN here."""
    return platform.moved(torch.arange(3.0, device="cuda") * 2, "cpu").tolist()


def test_what_moves_back_is_there(gpu_ranks):
    assert gpu_ranks(1, on_rank_way_back) == [[0.0, 2.0, 4.0]]

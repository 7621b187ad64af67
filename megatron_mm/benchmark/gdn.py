"""Times the gated delta rule, forward and backward, against transformers' torch kernel."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from megatron_mm.benchmark.measure import interleave, ratios
from megatron_mm.model.layers.gdn.delta_rule import gated_delta_rule

# rows and length, with similar numbers of positions
LENGTHS = ((32, 24), (4, 256), (1, 2048))
# key heads, value heads, width of key and value: of the presets tiny and small, and the width of
# Qwen3-Next with few heads
HEADS = ((2, 4, 16), (4, 8, 64), (2, 4, 128))


def inputs(rows: int, length: int, keys: int, values: int, width: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((keys, width), (keys, width), (values, width))
    made = [torch.randn(rows, length, *shape, generator=g) for shape in shapes]
    # Log decays from 0 to -1 per step, as softplus gives them at the start of training.
    made += [-torch.rand(rows, length, values, generator=g)]
    made += [torch.rand(rows, length, values, generator=g)]
    return [x.requires_grad_() for x in made]


def _theirs(*args: torch.Tensor) -> torch.Tensor:
    return torch_chunk_gated_delta_rule(*args, use_qk_l2norm_in_kernel=True)[0]


def _both_ways(function: Callable, args: list[torch.Tensor], direction: torch.Tensor) -> list:
    out = function(*args)
    return [out.detach(), *torch.autograd.grad(out, args, direction)]


def compare(rounds: int, warmup: int) -> list[dict[str, Any]]:
    """Compares all lengths and head sizes. Both sides repeat key heads and normalise inside.
    `largest_difference` is the largest relative difference of outputs and gradients."""
    found = []
    for keys, values, width in HEADS:
        for rows, length in LENGTHS:
            args = inputs(rows, length, keys, values, width)
            direction = torch.randn(args[2].shape, generator=torch.Generator().manual_seed(1))
            sides = [
                lambda _, f=f, a=args, d=direction: _both_ways(f, a, d)
                for f in (gated_delta_rule, _theirs)
            ]
            ours, theirs = (runs[warmup:] for runs in interleave(sides, rounds + warmup))
            pairs = zip(ours[0].result, theirs[0].result, strict=True)
            found.append(
                {
                    "rows": rows,
                    "length": length,
                    "key_heads": keys,
                    "value_heads": values,
                    "head_width": width,
                    "ours_ms": round(1e3 * statistics.median(x.seconds for x in ours), 2),
                    **ratios(theirs, ours),
                    "largest_difference": max(float((a - b).norm() / b.norm()) for a, b in pairs),
                }
            )
    return found

"""Measures the cost of CLVR beyond its FLOPs, and what a short stream saves."""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_mm.benchmark.measure import interleave, ratios
from megatron_mm.benchmark.models import SHAPES, make_batch, make_run, make_samples
from megatron_mm.benchmark.sides import Ours
from megatron_mm.config import RunConfig, without_clvr
from megatron_mm.data.batch import Microbatch
from megatron_mm.parallel.groups import Groups

BATCHES = 4


def attention_flops(model: torch.nn.Module, batch: Microbatch) -> int:
    """FLOPs of all attention calls, forward and backward, as computed here: on rectangles, causal
    or not, with 2 matrix products forward and 5 backward (scores are recomputed).

    torch's FlopCounterMode does not count flash attention on a CPU (`counted` checks that), so the
    calls are watched.
    """
    total = 0
    inner = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, *args, **kwargs):
        nonlocal total
        pairs = query[..., 0].numel() * key.shape[-2]
        total += 7 * pairs * (query.shape[-1] + value.shape[-1])
        return inner(query, key, value, *args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = watched
    try:
        with torch.no_grad():
            model(batch)
    finally:
        torch.nn.functional.scaled_dot_product_attention = inner
    return total


def counted(side: Ours, batch: Microbatch) -> int:
    """FLOPs of all matrix products in one forward and backward pass. torch does not count the
    delta rule's triangular solves, which are the same with and without looks."""
    with FlopCounterMode(display=False) as counter:
        side.engine.forward_backward([batch], side.objective)
    operators = counter.get_flop_counts()["Global"]
    if any("attention" in str(name) for name in operators):
        return counter.get_total_flops()
    return counter.get_total_flops() + attention_flops(side.engine.chunks[0], batch)


def _run(name: str, stream: str, looks: bool) -> RunConfig:
    run = make_run(name, image_stream=stream, vision_memory="tiles" if looks else "none")
    if not looks:
        run.model.hybrid_layer_pattern = without_clvr(run.model.hybrid_layer_pattern)
    return run


def compare(
    name: str, groups: Groups, rounds: int, warmup: int, samples: int | None = None
) -> dict[str, Any]:
    """Compares three models on the same images and words.

    `looking`: thumbnail in the stream, tiles in the memory. `blind`: the same tiles pass the ViT,
    but there are no looks; the baseline of CLVR. `full`: all tiles in the stream and no memory,
    the usual way to see details.
    """
    runs = {
        "looking": _run(name, "thumbnail", True),
        "blind": _run(name, "thumbnail", False),
        "full": _run(name, "all", False),
    }
    shape = replace(SHAPES[name], samples=samples or SHAPES[name].samples)
    drawn = {
        key: [make_batch(run, make_samples(run, shape, seed)) for seed in range(BATCHES)]
        for key, run in runs.items()
    }
    drawn["blind"] = [
        _same_tiles(a, b) for a, b in zip(drawn["blind"], drawn["looking"], strict=True)
    ]
    sides = {key: Ours(run, groups) for key, run in runs.items()}
    flops = {key: [counted(sides[key], batch) for batch in drawn[key]] for key in runs}

    def step(key: str, number: int) -> float:
        return sides[key].step([drawn[key][number % BATCHES]])

    found = interleave(
        [partial(step, key) for key in runs],
        rounds + warmup,
    )
    looking, blind, full = (side[warmup:] for side in found)
    share = sum(flops["looking"]) / sum(flops["blind"])
    measured = ratios(looking, blind)
    return {
        "samples_per_step": shape.samples,
        "tokens_per_step": {k: [b.num_real_tokens for b in v] for k, v in drawn.items()},
        "tiles_per_step": [len(b.pixels_NCHW) for b in drawn["looking"]],
        "flops_per_step": flops,
        "clvr_flops_ratio": round(share, 4),
        "clvr_time_ratio": measured,
        "clvr_time_over_flops": round(measured["ratio"] / share, 4),
        "clvr_cpu_time_over_flops": round(measured["cpu_ratio"] / share, 4),
        "summary_stream_samples_per_second": _speed(shape.samples, looking),
        "full_stream_samples_per_second": _speed(shape.samples, full),
        "summary_over_full_stream": ratios(full, looking),
    }


def _same_tiles(batch: Microbatch, other: Microbatch) -> Microbatch:
    """Returns `batch` with all tiles of `other`, whose stream has the same images."""
    assert torch.equal(batch.stream_positions, other.stream_positions)
    batch.pixels_NCHW, batch.stream_tiles = other.pixels_NCHW, other.stream_tiles
    return batch


def _speed(samples: int, runs: list) -> float:
    return round(statistics.median(samples / run.seconds for run in runs), 3)

"""Training steps of the fused model, ours against transformers'."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from megatron_mm.config import without_clvr
from megatron_mm.parallel.groups import Groups
from speed.measure import MemoryTracker, Timed, interleave, ratios
from speed.models import SHAPES, make_batch, make_run, make_samples
from speed.sides import Ours, Theirs, same_weights

BATCHES = 4  # different ones, in turn
# Losses are compared over the first steps: Adam divides by the size of the gradient, so where
# one is nearly zero its rounding decides the update, and the two runs part as any two do.
COMPARED = 3


def compare(
    name: str, groups: Groups, rounds: int, warmup: int, samples: int | None = None
) -> dict[str, Any]:
    """One model. CLVR is off, since transformers has none; all tiles are in the stream.

    Args:
        samples: in a microbatch, if not as many as the model's shape says.
    """
    run = make_run(name, image_stream="all", vision_memory="none")
    run.model.hybrid_layer_pattern = without_clvr(run.model.hybrid_layer_pattern)
    shape = replace(SHAPES[name], samples=samples or SHAPES[name].samples)
    batches = [make_batch(run, make_samples(run, shape, seed)) for seed in range(BATCHES)]
    tokens = [batch.num_real_tokens for batch in batches]

    memory = MemoryTracker()
    ours = Ours(run, groups)
    widest = batches[tokens.index(max(tokens))]
    ours.step(widest)
    ours_peak = memory.peak(lambda: ours.step(widest))
    memory = MemoryTracker()
    theirs = Theirs(run)
    tried = theirs.choose(batches[0])
    calls = theirs.prepare(widest)
    theirs.step(calls)
    theirs_peak = memory.peak(lambda: theirs.step(calls))
    del ours, theirs  # the timing starts from equal weights

    ours, theirs = Ours(run, groups), Theirs(run)
    theirs.use(min(tried, key=tried.get))
    same_weights(ours, theirs)
    calls = [theirs.prepare(batch) for batch in batches]
    found = interleave(
        [lambda i: ours.step(batches[i % BATCHES]), lambda i: theirs.step(calls[i % BATCHES])],
        rounds + warmup,
    )
    our_runs, their_runs = (side[warmup:] for side in found)
    counted = [tokens[(i + warmup) % BATCHES] for i in range(rounds)]
    differences = [abs(a.result - b.result) for a, b in zip(*found, strict=True)]
    return {
        "parameters": sum(p.numel() for p in ours.engine.chunks[0].parameters()),
        "samples_per_step": shape.samples,
        "tokens_per_step": tokens,
        "ours_tokens_per_second": _speed(counted, our_runs),
        "transformers_tokens_per_second": _speed(counted, their_runs),
        **ratios(their_runs, our_runs),
        "ours_peak_memory": ours_peak,
        "transformers_peak_memory": theirs_peak,
        "memory_ratio": round(ours_peak["peak_bytes"] / theirs_peak["peak_bytes"], 3),
        "largest_loss_difference": max(differences[:COMPARED]),
        "loss_differences": [float(f"{x:.2g}") for x in differences],
        "losses": [round(run.result, 5) for run in found[0]],
        "transformers_uses": theirs.way,
        "transformers_tried_cpu_seconds": tried,
    }


def _speed(tokens: list[int], runs: list[Timed]) -> float:
    speeds = (n / run.seconds for n, run in zip(tokens, runs, strict=True))
    return round(statistics.median(speeds), 1)

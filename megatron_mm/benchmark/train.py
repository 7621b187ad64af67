"""Times training steps of the fused model against transformers."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from megatron_mm.benchmark.measure import MemoryTracker, Timed, interleave, ratios
from megatron_mm.benchmark.models import SHAPES, make_batch, make_run, make_samples
from megatron_mm.benchmark.sides import LAYOUTS, Ours, Theirs, same_weights
from megatron_mm.config import RunConfig, without_clvr
from megatron_mm.data.sample import Sample
from megatron_mm.parallel.groups import Groups

BATCHES = 4  # different batches, used in turn
# Losses are compared only over the first steps. Adam divides by the size of the gradient, so where
# it is nearly zero, rounding decides the update and the two runs diverge.
COMPARED = 3


def compare(
    name: str, groups: Groups, rounds: int, warmup: int, samples: int | None = None
) -> dict[str, Any]:
    """Compares one model. CLVR, which transformers lacks, is off; all tiles are in the stream.

    Args:
        samples: samples per microbatch; None: by model.
    """
    run = make_run(name, image_stream="all", vision_memory="none")
    run.model.hybrid_layer_pattern = without_clvr(run.model.hybrid_layer_pattern)
    shape = replace(SHAPES[name], samples=samples or SHAPES[name].samples)
    drawn = [make_samples(run, shape, seed) for seed in range(BATCHES)]
    batches = [make_batch(run, of_one) for of_one in drawn]
    tokens = [batch.num_real_tokens for batch in batches]
    tried = Theirs(run).choose(batches[0])
    fastest = min(tried, key=tried.__getitem__)
    largest = tokens.index(max(tokens))
    memory = {
        layout: _memory(run, groups, layout, fastest.split(", ")[1], drawn[largest])
        for layout in LAYOUTS
    }

    ours, theirs = Ours(run, groups), Theirs(run)  # from equal weights
    theirs.use(fastest)
    same_weights(ours, theirs)
    calls = [theirs.prepare(batch) for batch in batches]
    found = interleave(
        [lambda i: ours.step([batches[i % BATCHES]]), lambda i: theirs.step(calls[i % BATCHES])],
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
        "memory": memory,
        "memory_ratio": max(found["ratio"] for found in memory.values()),
        "largest_loss_difference": max(differences[:COMPARED]),
        "loss_differences": [float(f"{x:.2g}") for x in differences],
        "losses": [round(run.result, 5) for run in found[0]],
        "transformers_uses": theirs.way,
        "transformers_tried_cpu_seconds": tried,
    }


def _memory(
    run: RunConfig, groups: Groups, layout: str, experts: str, samples: list[Sample]
) -> dict[str, Any]:
    """Returns the peak memory of both sides over one step on the same samples."""
    whole = make_batch(run, samples)
    tracker = MemoryTracker()
    ours = Ours(run, groups)
    given = [whole] if layout == "padded" else [make_batch(run, [one]) for one in samples]
    ours_peak = _peak(tracker, partial(ours.step, given))
    del ours
    tracker = MemoryTracker()
    theirs = Theirs(run)
    theirs.use(f"{layout}, {experts}")
    theirs_peak = _peak(tracker, partial(theirs.step, theirs.prepare(whole)))
    ratio = round(ours_peak["peak_bytes"] / theirs_peak["peak_bytes"], 3)
    return {"ours": ours_peak, "transformers": theirs_peak, "ratio": ratio}


def _peak(tracker: MemoryTracker, step: Callable[[], Any]) -> dict[str, int]:
    step()  # creates the optimizer state
    return tracker.peak(step)


def _speed(tokens: list[int], runs: list[Timed]) -> float:
    speeds = (n / run.seconds for n, run in zip(tokens, runs, strict=True))
    return round(statistics.median(speeds), 1)

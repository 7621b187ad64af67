"""Times DPO steps on pairs of text against TRL's `DPOTrainer`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from megatron_mm.benchmark.dpo_sides import LAYOUTS, OurDPO, TheirDPO, dpo_run
from megatron_mm.benchmark.grpo import trl_is_missing
from megatron_mm.benchmark.measure import interleave, ratios
from megatron_mm.benchmark.models import make_run
from megatron_mm.benchmark.pairs import make_pairs, our_batch, padding
from megatron_mm.benchmark.sides import Theirs, randomise, same_weights
from megatron_mm.config import without_clvr
from megatron_mm.parallel.groups import Groups
from megatron_mm.rl.completion_batch import CompletionBatch

BATCHES = 4  # different steps of each kind, in turn
PAIRS = {"tiny": 8, "small": 4}  # of a step
LENGTHS = ("drawn", "equal")
AGREES = 1e-4  # relative; fp32 sums over answers of 100 tokens, in another order


def compare(
    name: str, groups: Groups, rounds: int, warmup: int, pairs: int | None = None
) -> dict[str, Any] | str:
    """Compares one model on pairs whose lengths are drawn, and on pairs of equal lengths, where
    padding costs nothing. Returns why it cannot, if TRL is missing.

    Args:
        pairs: of a step; None: by model.
    """
    missing = trl_is_missing("DPOTrainer")
    if missing:
        return missing
    count = pairs or PAIRS[name]
    run = make_run(name, image_stream="all", vision_memory="none")
    run.model.hybrid_layer_pattern = without_clvr(run.model.hybrid_layer_pattern)
    steps = {
        kind: [
            make_pairs(run, name, count, equal=kind == "equal", seed=seed)
            for seed in range(BATCHES)
        ]
        for kind in LENGTHS
    }
    flat = [pair for of_kind in steps.values() for step in of_kind for pair in step]
    dpo_run(run, count, max(max(pair.lengths) for pair in flat))
    hf = Theirs(run)
    randomise(hf.model, seed=0)  # experts of a fresh model are so close that rounding chooses
    theirs, ours = TheirDPO(run, hf, flat), OurDPO(run, groups)
    same_weights(ours, hf)
    places = [range(n * count, (n + 1) * count) for n in range(2 * BATCHES)]
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in ours.engine.chunks[0].parameters()),
        "pairs_per_step": count,
        "reference": "a second set of weights, asked within the step on both sides",
        "agreement": agreement(ours, theirs, our_batch(run, steps["drawn"][0]), places[0]),
    }
    for number, kind in enumerate(LENGTHS):
        mine = places[number * BATCHES : (number + 1) * BATCHES]
        batches = [our_batch(run, step) for step in steps[kind]]
        found[kind] = {
            "tokens_per_step": [sum(sum(pair.lengths) for pair in step) for step in steps[kind]],
            "padding": round(statistics.mean(map(padding, steps[kind])), 3),
        } | _timed(ours, theirs, batches, mine, rounds, warmup)
    return found


def _timed(
    ours: OurDPO,
    theirs: TheirDPO,
    batches: Sequence[CompletionBatch],
    places: Sequence[Sequence[int]],
    rounds: int,
    warmup: int,
) -> dict[str, Any]:
    """Times steps of ours and of TRL's in both layouts, each with the fastest way to compute
    experts. The `ratio` is to the faster layout."""
    tried = theirs.choose(places[0])
    ways = [min((w for w in tried if w.startswith(x)), key=tried.__getitem__) for x in LAYOUTS]

    def other(way: str) -> Callable[[int], float]:
        theirs.use(way)
        calls = [theirs.prepare(step) for step in places]

        def step(number: int) -> float:
            theirs.use(way)
            return theirs.step(calls[number % len(calls)])

        return step

    sides = [lambda i: ours.step(batches[i % len(batches)]), *map(other, ways)]
    our_runs, *found = (side[warmup:] for side in interleave(sides, rounds + warmup))
    medians = [statistics.median(run.cpu for run in runs) for runs in found]
    fastest = medians.index(min(medians))
    return {
        "ours_seconds": round(statistics.median(run.seconds for run in our_runs), 4),
        "trl_seconds": round(statistics.median(run.seconds for run in found[fastest]), 4),
        **ratios(found[fastest], our_runs),
        "trl_uses": ways[fastest],
        "by_layout": {x: ratios(runs, our_runs) for x, runs in zip(LAYOUTS, found, strict=True)},
        "trl_tried_cpu_seconds": tried,
    }


def agreement(
    ours: OurDPO, theirs: TheirDPO, batch: CompletionBatch, places: Sequence[int]
) -> dict[str, Any]:
    """Checks that both sides compute the same step, at the reference and away from it, where both
    then stay. Returns the losses and the norms of the gradients, ours first.

    Raises:
        ValueError: they do not.
    """
    calls = theirs.prepare(places)
    start = ours.gradients(batch), theirs.gradients(calls)
    theirs.move(seed=0)
    same_weights(ours, theirs.theirs)
    moved = ours.gradients(batch), theirs.gradients(calls)
    norms = ours.norm(), theirs.norm()
    for name, found in (
        ("loss at the reference", (*start, math.log(2))),
        ("loss away from it", moved),
        ("gradient norm", norms),
    ):
        if not max(found) <= (1 + AGREES) * min(found):  # NaN is not below anything
            raise ValueError(f"ours and TRL's differ: {name} {found[0]} and {found[1]}")
    return {"loss_at_reference": start, "loss": moved, "gradient_norm": norms}

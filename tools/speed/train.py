"""Training steps of the fused model, ours against transformers'."""

from __future__ import annotations

import statistics
from typing import Any

from megatron_mm.config import without_clvr
from megatron_mm.parallel.groups import Groups
from speed.measure import MemoryTracker, interleave, ratio
from speed.models import SHAPES, make_batch, make_run, make_samples
from speed.sides import Ours, Theirs, same_weights

BATCHES = 4  # different ones, in turn


def compare(name: str, groups: Groups, rounds: int, warmup: int) -> dict[str, Any]:
    """One model. CLVR is off, since transformers has none; all tiles are in the stream."""
    run = make_run(name, image_stream="all", vision_memory="none")
    run.model.hybrid_layer_pattern = without_clvr(run.model.hybrid_layer_pattern)
    batches = [make_batch(run, make_samples(run, SHAPES[name], seed)) for seed in range(BATCHES)]
    our_memory = MemoryTracker()
    ours = Ours(run, groups)
    theirs = Theirs(run)
    tried = theirs.choose(batches[0])
    calls = [theirs.prepare(batch) for batch in batches]
    same_weights(ours, theirs)
    del our_memory
    our_runs, their_runs = interleave(
        [lambda i: ours.step(batches[i % BATCHES]), lambda i: theirs.step(calls[i % BATCHES])],
        rounds,
        warmup,
    )
    tokens = [batches[(i + warmup) % BATCHES].num_real_tokens for i in range(rounds)]
    seconds = [[t for t, _ in runs] for runs in (our_runs, their_runs)]
    losses = [[loss for _, loss in runs] for runs in (our_runs, their_runs)]
    return {
        "parameters": sum(p.numel() for p in ours.engine.inner.parameters()),
        "samples": SHAPES[name].samples,
        "tokens_per_step": round(statistics.mean(tokens), 1),
        "ours_tokens_per_second": _speed(tokens, seconds[0]),
        "transformers_tokens_per_second": _speed(tokens, seconds[1]),
        **ratio(seconds[1], seconds[0]),
        "largest_loss_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "losses": [round(x, 5) for x in losses[0]],
        "transformers_uses": theirs.way,
        "transformers_tried_seconds": tried,
    }


def _speed(tokens: list[int], seconds: list[float]) -> float:
    return round(statistics.median(n / t for n, t in zip(tokens, seconds, strict=True)), 1)

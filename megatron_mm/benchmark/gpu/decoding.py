"""Decoding with the slice of mm-80b: a step of many rows.

A rollout is timed at two lengths, and their difference divided by that of the lengths: prefill,
captures and ends are in both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron_mm.benchmark.gpu.slice import built
from megatron_mm.benchmark.gpu.timing import kernels, medians, waits
from megatron_mm.benchmark.gpu.visit import Row, Visit
from megatron_mm.data.sample import Sample
from megatron_mm.engine.engine import Engine
from megatron_mm.generation.generate import Prompts, generate
from megatron_mm.generation.sampling import Sampling

ROWS = (16, 128)


class Rollout:
    """Completions of one prompt, all of the same length."""

    def __init__(self, engine: Engine, rows: int, prompt: int):
        self.engine, self.rows = engine, rows
        words = engine.run.model.language.vocab_size - 1
        tokens = torch.randint(0, words, (prompt,), generator=torch.Generator().manual_seed(0))
        self.sample = Sample(tokens, tokens.roll(-1), torch.zeros(prompt), [], "prompt:0")

    def __call__(self, tokens: int) -> None:
        """Generates `tokens` tokens in every row; nothing stops one before."""
        found = generate(
            self.engine,
            Prompts(lambda _: self.sample, [0]),
            Sampling((), tokens),
            num_generations=self.rows,
            max_num_seqs=self.rows,
            pad_id=0,
            record_routes=True,
        )
        assert found is not None  # nobody stops it
        lengths = {len(completion.tokens_G) for completion in found[0]}
        if lengths != {tokens}:
            raise RuntimeError(f"completions of {tokens} tokens have lengths {sorted(lengths)}")


def check(visit: Visit, row: Row) -> None:
    """Measures a step at each number of rows."""
    engine, prompt = built(visit).engine, visit.size(512, 12)
    layers = len(engine.chunks[0].letters)
    row.note(sublayers=layers, prompt=prompt)
    for rows in ROWS:
        found = _step(visit, Rollout(engine, rows, prompt))
        row.note({f"{rows} rows": found})
        row.text.append(
            f"{rows} rows {found['ms']:.2f} ms a step ({found['busy_ms']:.2f} busy, "
            f"{found['launches']:.0f} launches, {found['waits']:.1f} waits, {layers} sub-layers)"
        )


def _step(visit: Visit, rollout: Rollout) -> dict[str, Any]:
    """Costs of one step of a rollout: the difference of two lengths."""
    few, many = lengths = visit.size((16, 48), (2, 4))
    calls = {n: partial(rollout, n) for n in lengths}
    times = medians(calls, visit.size(3, 1), warmup=visit.size(1, 0))
    waited = {n: waits(call, visit.fake) for n, call in calls.items()}
    seen = {n: kernels(call, visit.fake, most=8) for n, call in calls.items()}

    def a_step(of: Callable[[int], float]) -> float:
        return round((of(many) - of(few)) / (many - few), 3)

    return {
        "ms": a_step(times.__getitem__),
        "busy_ms": a_step(lambda n: seen[n].busy),
        "launches": a_step(lambda n: seen[n].launches),
        "kernels": a_step(lambda n: seen[n].count),
        "waits": a_step(lambda n: waited[n].total()),
        "waits_profiled": a_step(lambda n: seen[n].waits),
        "waits_at": dict((waited[many] - waited[few]).most_common(12)),
        "top": seen[many].top,
    }

"""Times completions that look (letters Q and V) against as many plain tokens of the same model, and
of the model without glimpses."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

from megatron_mm.benchmark import prompts as asked
from megatron_mm.benchmark.measure import Timed, interleave, ratios
from megatron_mm.benchmark.models import make_run
from megatron_mm.config import RunConfig, without_clvr
from megatron_mm.config.layers.queries import query_settings
from megatron_mm.data.looks import LookTokens
from megatron_mm.data.sample import Sample
from megatron_mm.engine.engine import Engine
from megatron_mm.generation.generate import Prompts, generate
from megatron_mm.generation.lanes import Completion
from megatron_mm.generation.sampling import Sampling
from megatron_mm.parallel.groups import Groups

PROMPTS, GROUP = 4, 8
WORDS = 4  # that the model chooses among, one of them the query: a look every few tokens


def _run(name: str, glimpses: bool) -> RunConfig:
    """A run of the preset with a glimpse behind the first half of its layers, or without."""
    run = make_run(name, image_stream="thumbnail", vision_memory="pyramid")
    layers = without_clvr(run.model.hybrid_layer_pattern)
    half = len(layers) // 4 * 2
    pattern = f"{layers[:half]}QV{layers[half:]}" if glimpses else layers
    run.model = replace(run.model, hybrid_layer_pattern=pattern)
    return run


def _few_words(engine: Engine) -> None:
    """Leaves the model few words to say; what it computes is the same."""
    for name, param in engine.chunks[-1].named_parameters():
        if name == "output_layer.weight":
            param.data[WORDS:] = 0.0


def _draw(
    engine: Engine, samples: list[Sample], tokens: int, looks: LookTokens | None
) -> list[Completion]:
    found = generate(
        engine,
        Prompts(samples.__getitem__, range(len(samples))),
        Sampling((asked.NEVER,), tokens, 1.0, top_k=WORDS, looks=looks),
        num_generations=GROUP,
        max_num_seqs=len(samples) * GROUP,
        pad_id=0,
    )
    assert found is not None  # nothing stops this generation
    return [completion for group in found for completion in group]


def compare(name: str, groups: Groups, rounds: int, warmup: int, tokens: int) -> dict[str, Any]:
    """Times eight completions of `tokens` positions for each of four prompts: `looking`, with the
    slots of looks among them; `plain`, of the same model that never looks; `without`, of the model
    without glimpses."""
    run = _run(name, True)
    settings = query_settings(run.model)
    assert settings is not None
    engine, base = (Engine.create(each, groups) for each in (run, _run(name, False)))
    for each in (engine, base):
        _few_words(each)
    samples = asked.make_prompts(run, name, PROMPTS, images=True, seed=0)
    said = Counter(t for c in _draw(engine, samples, tokens, None) for t in c.tokens_G.tolist())
    query = said.most_common(1)[0][0]
    looks = LookTokens(query, run.model.language.vocab_size - 2, settings.slots, tokens, 0.1)
    sides = [(engine, looks), (engine, None), (base, None)]

    def draw(number: int, side: tuple[Engine, LookTokens | None]) -> list[Completion]:
        return _draw(side[0], samples, tokens, side[1])

    found = interleave([partial(draw, side=side) for side in sides], rounds + warmup)
    looking, plain, without = (side[warmup:] for side in found)
    asks = statistics.mean(len(c.looked_NQ3) for c in looking[0].result)
    return {
        "prompts": PROMPTS,
        "completions_of_each": GROUP,
        "positions": tokens,
        "looks_of_a_completion": round(asks, 2),
        "share_of_slots": round(asks * settings.slots / tokens, 3),
        "looking_positions_per_second": _speed(looking, tokens),
        "looking_over_plain": ratios(looking, plain),
        "looking_over_without_glimpses": ratios(looking, without),
    }


def _speed(runs: list[Timed], tokens: int) -> float:
    return round(statistics.median(PROMPTS * GROUP * tokens / run.seconds for run in runs), 1)

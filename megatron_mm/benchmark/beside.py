"""Measures the encoder beside the pipeline against the encoder in its first stage, on two ranks.

The model is `small` with so many layers in its ViT that it is 70 % of the arithmetic, which no
split of the layers over two stages balances. Sides take turns as in `scaling.py`: on two stages
with 2 m microbatches the encoder in the first stage, with the layers split by cost (then nearly all
are on the other stage) and in halves, and the encoder beside the pipeline; and a rank alone with m,
encoding beside its only stage: two of it are the even split, with nothing sent and no bubble.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

from megatron.core import parallel_state

from megatron_mm.benchmark.models import make_run
from megatron_mm.benchmark.scaling import Side, alone, in_turn
from megatron_mm.benchmark.throughput import spread
from megatron_mm.config import RunConfig
from megatron_mm.config.pattern import effective_pattern
from megatron_mm.config.vision_parallel import encoder_share
from megatron_mm.model.families.internvit.settings import InternViTSettings
from megatron_mm.parallel import groups

MODEL, MICROBATCHES, SHARE = "small", 8, 0.83
SAMPLES, TOKENS, TILES = 2, 160, 4
NAMES = ("alone", "in the first stage", "in the first stage, in halves", "beside the pipeline")
PHASES = ("encode", "forward", "backward", "encode backward")


def _run(**parallel: Any) -> RunConfig:
    run = make_run(MODEL)
    run.data.seq_length, run.data.max_num_tiles = TOKENS, TILES
    run.training.micro_batch_size = SAMPLES
    vision = run.model.vision
    assert isinstance(vision, InternViTSettings)  # the preset's
    while encoder_share(run) < SHARE:
        vision.vision_num_layers += 1
    run.parallel = replace(run.parallel, **parallel)
    return run


def make_sides() -> dict[str, Side]:
    """Builds all sides, in a job of two ranks that has no groups yet."""
    within = _run(pipeline_model_parallel_size=2)
    letters = effective_pattern(within.model).replace(" ", "")
    half = len(letters) // 2
    halves = deepcopy(within)
    halves.parallel.pipeline_model_parallel_layout = f"{letters[:half]}|{letters[half:]}"
    beside = _run(pipeline_model_parallel_size=2, vision_parallel="replica")
    whole = _run(vision_parallel="replica")
    two = groups.build(beside.parallel)
    parallel_state.destroy_model_parallel()
    one = alone(groups.build(whole.parallel))
    sides = (
        Side(whole, one, MICROBATCHES),
        Side(within, replace(two, encoder=None), 2 * MICROBATCHES),
        Side(halves, replace(two, encoder=None), 2 * MICROBATCHES),
        Side(deepcopy(beside), two, 2 * MICROBATCHES),
    )
    return dict(zip(NAMES, sides, strict=True))


def measure(rounds: int, warmup: int) -> dict[str, Any]:
    """Measures all sides, in a job of two ranks that has no groups. Both ranks call it."""
    return summary(in_turn(make_sides(), rounds, warmup))


def summary(found: dict[str, list]) -> dict[str, Any]:
    """Returns medians of single rounds' ratios, whose sides were measured side by side."""
    ideal = [2 / sum(1 / note["seconds"] for note in notes) for notes in found[NAMES[0]]]
    within, halves, beside = (
        [max(note["seconds"] for note in notes) for notes in found[name]] for name in NAMES[1:]
    )
    phases = {name: spread([_seconds(notes, name) for notes in found[NAMES[3]]]) for name in PHASES}
    run = _run()
    assert isinstance(run.model.vision, InternViTSettings)
    return {
        "model": MODEL,
        "vision_num_layers": run.model.vision.vision_num_layers,
        "encoder_share": encoder_share(run),
        "rounds": len(ideal),
        "beside_over_first_stage": spread([a / b for a, b in zip(within, beside, strict=True)]),
        "beside_over_halves": spread([a / b for a, b in zip(halves, beside, strict=True)]),
        "beside_over_even_split": spread([a / b for a, b in zip(ideal, beside, strict=True)]),
        "phase_seconds": phases,
    }


def _seconds(notes: list[dict[str, Any]], phase: str) -> float:
    """Returns the seconds of the slower rank, without communication."""
    return max(note["phases"].get(phase, {"seconds": 0.0})["seconds"] for note in notes)


def text(result: dict[str, Any]) -> str:
    def line(name: str) -> str:
        low, high = result[name]["quartiles"]
        return f"{result[name]['median']:.3f} ({low:.3f} to {high:.3f})"

    parts = ", ".join(f"{k} {v['median']:.3f} s" for k, v in result["phase_seconds"].items())
    return "\n".join(
        [
            f"{result['rounds']} rounds of {result['model']} with {result['vision_num_layers']} "
            f"layers in the ViT, {result['encoder_share']:.0%} of the arithmetic, PP2",
            "speed beside the pipeline over",
            f"  in the first stage, layers split by cost: {line('beside_over_first_stage')}",
            f"  in the first stage, layers in halves:     {line('beside_over_halves')}",
            f"  the even split:                           {line('beside_over_even_split')}",
            f"phases: {parts}",
        ]
    )

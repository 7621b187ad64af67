"""Which ranks encode images where the settings leave it open."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from megatron_mm.config.cost import costs
from megatron_mm.config.pattern import effective_pattern, parse_pattern
from megatron_mm.config.settings import ParallelConfig, RunConfig


def encoder_share(run: RunConfig) -> float:
    """The encoder's share of a step's FLOPs, by settings alone (see cost.py)."""
    found = costs(replace(run, parallel=ParallelConfig(vision_parallel="stage")))
    layers = parse_pattern(effective_pattern(run.model))
    rest = sum(found.letters[layer.kind] for layer in layers) + found.last
    return found.first / (found.first + rest)


def chosen(run: RunConfig) -> tuple[Literal["stage", "replica"], str]:
    """Returns `vision_parallel` of a run that leaves it open, and the reason in words.

    A first stage cannot cost less than the encoder in it. Beside the pipeline every rank has its
    share, but an encoder that learns runs forward once more, a third of its step.
    `tools/plan.py search` compares both in full.
    """
    parallel = run.parallel
    if run.model.vision is None:
        return "stage", "the model has no encoder"
    if parallel.pipeline_model_parallel_size == 1:
        return "stage", "there is no pipeline that would wait for it"
    if parallel.pipeline_model_parallel_layout is not None:
        return "stage", "the layout of the pipeline is given"
    stages = parallel.pipeline_model_parallel_size
    stages *= parallel.virtual_pipeline_model_parallel_size or 1
    share = encoder_share(run)
    learns = run.trains("vision") or run.lora.freezes("vision")  # by itself, or by its adapters
    mean = (1 + share / 3 if learns else 1.0) / stages
    words = (
        f"the encoder is {share:.0%} of a step, and beside the pipeline each of {stages} stages "
        f"has {mean:.0%}"
    )
    return ("replica" if share > mean else "stage"), words


def decided(run: RunConfig) -> RunConfig:
    """The run with `vision_parallel` chosen, if it was left open."""
    if run.parallel.vision_parallel is not None:
        return run
    return replace(run, parallel=replace(run.parallel, vision_parallel=chosen(run)[0]))

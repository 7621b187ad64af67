"""One step on a layout, planned and really taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_mm.config import RunConfig, hops
from megatron_mm.data.batch import Microbatch
from megatron_mm.engine.engine import Engine
from megatron_mm.parallel import groups
from megatron_mm.perf import memory
from megatron_mm.perf.assumed import planned_batch, routes_of_layer
from megatron_mm.perf.encoder import dealt
from megatron_mm.perf.kernels import MORE_FLOPS
from megatron_mm.perf.rank import RankPlan, plan_rank
from megatron_mm.perf.recorder import Recorder
from megatron_mm.train.sft import SupervisedFineTuning
from support.batches import SIZES, small_run
from support.samples import random_pixels


def layout_run(sizes: dict, replicas: int) -> RunConfig:
    """Returns a run of the small model on a layout.

    Args:
        sizes: sizes by their short names (`SIZES`), or settings by theirs.
        replicas: the number of data-parallel replicas.
    """
    run = small_run()
    run.model.language.num_experts = 8  # divides by everything
    run.data.seq_length, run.data.max_num_tiles = 96, 3
    pattern = sizes.get("hybrid_layer_pattern")
    if pattern is not None:
        run.model = replace(run.model, hybrid_layer_pattern=pattern)
    for name, value in sizes.items():
        name = SIZES.get(name, name)
        model, others = run.model, (run.parallel, run.training, run.data)
        for section in (*others, model.fusion, model.language, *model.layers.values()):
            if hasattr(section, name):
                setattr(section, name, value)
    # The second shows what the first leaves behind; a pipeline has several in flight.
    microbatches = 4 if run.parallel.pipeline_model_parallel_size > 1 else 2
    run.training.global_batch_size = microbatches * replicas * run.training.micro_batch_size
    return run


def world_of(run: RunConfig, replicas: int) -> int:
    """Returns the number of ranks."""
    par = run.parallel
    return (
        par.tensor_model_parallel_size
        * par.context_parallel_size
        * par.pipeline_model_parallel_size
        * replicas
    )


def the_batch(run: RunConfig) -> Microbatch:
    """Returns the microbatch that the planner assumes, with the balanced routes that it assumes."""
    batch = planned_batch(run)
    tokens = len(batch.tokens_T)
    return replace(batch, routes={n: routes_of_layer(run, n, tokens) for n in hops(run.model)})


def planned(run: RunConfig, world: int) -> list[RankPlan]:
    """Returns the plan of every rank."""
    return [plan_rank(run, rank, world, the_batch(run), kernels="torch") for rank in range(world)]


def _of_tensors() -> dict[Any, Callable[..., int]]:
    """Returns `MORE_FLOPS` with torch's mark of formulas that take tensors, not shapes."""

    def marked(formula: Callable[..., int]) -> Callable[..., int]:
        @wraps(formula)
        def raw(*args, **kwargs) -> int:
            return formula(*args, **kwargs)

        raw._get_raw = True
        return raw

    return {packet: marked(formula) for packet, formula in MORE_FLOPS.items()}


def measure(run: RunConfig, microbatches: int):
    """Takes the step on a real rank and measures it.

    Returns:
        The state's bytes, the peak bytes of activations, the work that was recorded, and the FLOPs
        that torch's counter counts.
    """
    made = groups.build(run.parallel)
    engine = Engine.create(run, made)
    batch = the_batch(run)
    generator = torch.Generator().manual_seed(0)
    tiles, _, side, _ = batch.pixels_NCHW.shape
    batch = replace(batch, pixels_NCHW=random_pixels(tiles, side, generator))
    batches = [batch] * microbatches
    if engine.encoder is not None:
        batches = dealt(batch, microbatches, engine.encoder.owners)
    recorder = Recorder(made.pg, made.encoder)
    with recorder:
        engine.forward_backward(batches, SupervisedFineTuning())
    peak = recorder.peak
    # In a step of its own: the counter's hooks on modules keep tensors alive.
    counter = FlopCounterMode(display=False, custom_mapping=_of_tensors())
    with counter:
        engine.forward_backward(batches, SupervisedFineTuning())
    with recorder:
        engine.update(engine.gradient_norm())
    return memory.measured(engine), peak, recorder.work, counter.get_total_flops()

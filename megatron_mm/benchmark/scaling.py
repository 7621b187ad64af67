"""Measures the parallel efficiency of two ranks against two independent ranks, one thread each.

Every rank has equal work: an independent rank trains on m microbatches, two replicas on m each, and
two stages of half a model each on 2 m. The sides take turns in the same two processes, so other
load on the machine slows all of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import fields, replace
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm.benchmark.measure import turns
from megatron_mm.benchmark.mock import made_step
from megatron_mm.benchmark.models import make_run
from megatron_mm.benchmark.throughput import spread
from megatron_mm.config import ConfigError, RunConfig
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import broadcast_batches
from megatron_mm.parallel import groups
from megatron_mm.parallel.groups import EncoderGroups, Groups
from megatron_mm.perf.phases import Phases
from megatron_mm.train.sft import SupervisedFineTuning

MODEL, MICROBATCHES = "tiny", 8
SAMPLES, TOKENS, TILES = 16, 128, 9  # samples per microbatch; tokens and tiles per sample


class Side:
    """Engine on its own groups, with the same microbatches in every round."""

    def __init__(self, run: RunConfig, built: Groups, microbatches: int):
        self.built, self.microbatches = built, microbatches
        self.engine, self.objective = Engine.create(run, built), SupervisedFineTuning()
        made = made_step(run, microbatches, seed=0) if built.is_reader else []
        self.batches = broadcast_batches(built, made)

    def step(self) -> dict[str, Any]:
        """Runs a step together with the other rank. Returns this rank's seconds and phases."""
        with Phases(self.built) as phases:
            dist.barrier()
            begin = time.perf_counter()
            with phases.region("step"):
                self.engine.forward_backward(self.batches, self.objective)
                with phases.region("optimizer"):
                    self.engine.update(self.engine.gradient_norm())
            seconds = time.perf_counter() - begin
            passes = {name: phases.each(name) for name in ("forward", "backward")}
            return {"seconds": seconds, "passes": passes, "phases": phases.take()}


def one_forward_one_backward(
    forward: Sequence[Sequence[float]], backward: Sequence[Sequence[float]]
) -> float:
    """Returns the seconds from the first forward to the last backward pass of the 1F1B schedule
    without communication (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).

    Args:
        forward, backward: seconds of each microbatch on each stage.
    """
    stages, microbatches = len(forward), len(forward[0])
    orders = []
    for stage in range(stages):
        warmup = min(stages - stage - 1, microbatches)
        steady = [(kind, i + warmup * (kind == "F")) for i in range(microbatches) for kind in "FB"]
        order = [("F", i) for i in range(warmup)] + steady
        orders.append([(kind, i) for kind, i in order if i < microbatches])
    ends: dict[tuple[str, int, int], float] = {}
    clock, at = [0.0] * stages, [0] * stages
    while any(at[s] < len(orders[s]) for s in range(stages)):
        for stage in range(stages):
            if at[stage] == len(orders[stage]):
                continue
            kind, i = orders[stage][at[stage]]
            before = ("F", i, stage - 1) if kind == "F" else ("B", i, stage + 1)
            if 0 <= before[2] < stages and before not in ends:
                continue
            begin = max(clock[stage], ends.get(before, 0.0))
            clock[stage] = begin + (forward if kind == "F" else backward)[stage][i]
            ends[kind, i, stage] = clock[stage]
            at[stage] += 1
    return max(clock)


def alone(built: Groups) -> Groups:
    """Returns groups of this rank alone."""
    for rank in range(dist.get_world_size()):
        group = dist.new_group([rank])
        if rank == dist.get_rank():
            mine = group
    pg = ProcessGroupCollection()
    for field in fields(built.pg):
        group = getattr(built.pg, field.name, None)
        single = isinstance(group, dist.ProcessGroup)
        setattr(pg, field.name, mine if single else group)
    encoder = None if built.encoder is None else EncoderGroups(pg, mine)
    return replace(built, pg=pg, replica=mine, world=mine, encoder=encoder)


def _run(**parallel: Any) -> RunConfig:
    run = make_run(MODEL)
    run.data.seq_length, run.data.max_num_tiles = TOKENS, TILES
    run.training.micro_batch_size = SAMPLES
    run.parallel = replace(run.parallel, **parallel)
    return run


def measure(rounds: int, warmup: int) -> dict[str, Any]:
    """Measures all sides, in a job that has no groups. Every rank calls it.

    Raises:
        ConfigError: there are not two ranks.
    """
    if dist.get_world_size() != 2:
        raise ConfigError(
            f"scaling runs on 2 ranks, here are {dist.get_world_size()}; allowed: torchrun "
            "--nproc-per-node 2"
        )
    found = in_turn(make_sides(), rounds, warmup)
    parallel_state.destroy_model_parallel()
    return summary(found)


def make_sides() -> dict[str, Side]:
    """Builds all sides, in a job of two ranks that has no groups yet."""
    pipeline, plain = _run(pipeline_model_parallel_size=2), _run()
    stages = groups.build(pipeline.parallel)
    parallel_state.destroy_model_parallel()
    replicas = groups.build(plain.parallel)
    return {
        "alone": Side(plain, alone(replicas), MICROBATCHES),
        "data parallel": Side(deepcopy(plain), replicas, MICROBATCHES),
        "pipeline parallel": Side(pipeline, stages, 2 * MICROBATCHES),
    }


def in_turn(sides: dict[str, Side], rounds: int, warmup: int) -> dict[str, list]:
    """Returns the results of each rank's `Side.step` for every timed round."""
    found: dict[str, list] = {name: [] for name in sides}
    for order in turns(sides, rounds + warmup):
        for name in order:
            notes: list = [None, None]
            dist.all_gather_object(notes, sides[name].step())
            found[name].append(notes)
    return {name: notes[warmup:] for name, notes in found.items()}


def summary(found: dict[str, list]) -> dict[str, Any]:
    """Returns medians of single rounds' ratios, whose sides were measured side by side."""
    # The speed of two independent ranks is the sum of their speeds.
    alone = [2 / sum(1 / note["seconds"] for note in notes) for notes in found["alone"]]
    together = {
        name: [max(note["seconds"] for note in notes) for notes in found[name]]
        for name in ("data parallel", "pipeline parallel")
    }
    theory = [_theory(notes) for notes in found["pipeline parallel"]]
    bubble = 1 / (2 * MICROBATCHES + 1)  # of two equal stages with 2 m microbatches
    data = [a / b for a, b in zip(alone, together["data parallel"], strict=True)]
    pipe = [a / b for a, b in zip(alone, together["pipeline parallel"], strict=True)]
    of_theory = [a / b for a, b in zip(theory, together["pipeline parallel"], strict=True)]
    return {
        "model": MODEL,
        "microbatches_of_a_rank": MICROBATCHES,
        "samples_tokens_tiles": [SAMPLES, TOKENS, TILES],
        "rounds": len(alone),
        "seconds": {"alone": spread(alone)} | {n: spread(s) for n, s in together.items()},
        "data_parallel_efficiency": spread(data),
        "pipeline_parallel_efficiency": spread(pipe),
        "pipeline_bubble_of_even_stages": bubble,
        "pipeline_theory_seconds": spread(theory),
        "pipeline_theory_over_measured": spread(of_theory),
    }


def _theory(notes: list[dict[str, Any]]) -> float:
    """Predicted seconds of a step, from the time of every pass on each stage: 1F1B and the rest."""
    forward, backward = (
        [note["passes"][name] for note in notes] for name in ("forward", "backward")
    )
    after = max(
        sum(note["phases"][phase]["seconds"] for phase in ("optimizer", "other")) for note in notes
    )
    return one_forward_one_backward(forward, backward) + after


def text(result: dict[str, Any]) -> str:
    def line(name: str) -> str:
        low, high = result[name]["quartiles"]
        return f"{result[name]['median']:.3f} ({low:.3f} to {high:.3f})"

    return "\n".join(
        [
            f"{result['rounds']} rounds of {result['model']}, two ranks of one thread each",
            f"data parallel, of two ranks alone:      {line('data_parallel_efficiency')}",
            f"pipeline parallel, of two ranks alone:  {line('pipeline_parallel_efficiency')}"
            f" (bubble of even stages {result['pipeline_bubble_of_even_stages']:.3f})",
            f"1F1B in theory over measured:           {line('pipeline_theory_over_measured')}",
        ]
    )

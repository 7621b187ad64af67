"""Measures the throughput of a run on any layout, and the time of its phases."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_mm import platform
from megatron_mm.benchmark.measure import Peak, quartiles
from megatron_mm.benchmark.mock import Mock, Source, balanced, made_step, mock_like
from megatron_mm.config import ConfigError, RunConfig, to_dict
from megatron_mm.config.objectives import declaration
from megatron_mm.convert.token_notes import token_notes
from megatron_mm.data.batch import Microbatch
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import broadcast_batches
from megatron_mm.engine.objective import Objective
from megatron_mm.errors import NonFiniteError
from megatron_mm.parallel.groups import Groups
from megatron_mm.perf.flops import model_flops, total
from megatron_mm.perf.phases import Phases
from megatron_mm.train.sft import SupervisedFineTuning
from megatron_mm.train.source import open_data, open_step_source
from megatron_mm.train.start import start

STORED = 2  # steps kept in memory for mock data
STRETCH = 4  # consecutive steps of a side, the first untimed: its batch may have been read before
COUNTS = ("samples", "tokens", "supervised", "tiles", "model_flops")


class Bench:
    """Engine and the sources it is measured on."""

    def __init__(self, run: RunConfig, groups: Groups, phases: Phases):
        self.run, self.groups, self.phases = run, groups, phases
        self.clock: dict[str, float] = {}  # times of a rollout
        torch.manual_seed(run.training.seed)
        self.engine = Engine.create(run, groups)

    def sources(self, kinds: Sequence[str], routings: Sequence[str]) -> dict[str, Source]:
        """Returns sources by "<data>, <routing>"."""
        sources: dict[str, Source] = {}
        made: list[list[Microbatch]] = []
        objective: Objective = SupervisedFineTuning()
        if "real" in kinds:
            tokenizer, loader = open_data(self.run, self.groups)
            start(self.engine, loader, self.run.checkpoint, token_notes(self.run, tokenizer))
            real = open_step_source(self.run, self.engine, tokenizer, loader)
            if "mock" in kinds or "balanced" in routings:
                position = loader.state_dict()
                made = [list(real.next_step(False)[0]) for _ in range(STORED)]
                objective = real.objective  # whose targets they hold
                loader.load_state_dict(position)
            if "natural" in routings:
                sources["real, natural"] = real
            # Balanced routes are possible only for batches in memory.
        elif "mock" in kinds:
            made = [self._made(number) for number in range(STORED)]
        if "mock" in kinds:
            vocabulary = self.run.model.language.vocab_size - 1
            seeds = [10_000 * n + self.groups.pg.dp.rank() for n in range(STORED)]
            mock = [
                [mock_like(b, vocabulary, 100 * seed + i) for i, b in enumerate(step)]
                for seed, step in zip(seeds, made, strict=True)
            ]
            if "natural" in routings:
                sources["mock, natural"] = Mock(mock, objective)
            if "balanced" in routings:
                even = [list(map(self._balanced, step)) for step in mock]
                sources["mock, balanced"] = Mock(even, objective)
        return sources

    def _made(self, number: int) -> list[Microbatch]:
        training, replicas = self.run.training, self.groups.pg.dp.size()
        count = training.global_batch_size // (training.micro_batch_size * replicas)
        batches = []
        if self.groups.is_reader:
            seed = number * replicas + self.groups.pg.dp.rank()
            batches = made_step(self.run, count, seed)
        return broadcast_batches(self.groups, batches)

    def _balanced(self, batch: Microbatch) -> Microbatch:
        layers = [layer for chunk in self.engine.chunks for layer in chunk.moe_layers]
        return balanced(batch, layers, self.run.model)

    def round(self, source: Source) -> list[Microbatch]:
        """Runs a step, or a rollout and all of its steps. Returns its microbatches."""
        phases, self.clock = self.phases, {}
        done: list[Microbatch] = []
        reading = "rollout" if declaration(self.run).generates else "data"
        with phases.region("step"):
            while not done or not source.between:
                with phases.region(reading):
                    batches, _ = source.next_step(False)
                self.clock |= {k: v for k, v in source.metrics.items() if "timing_s/" in k}
                self.engine.forward_backward(batches, source.objective)
                with phases.region("optimizer"):
                    norm = self.engine.gradient_norm()
                    if not math.isfinite(norm):
                        raise NonFiniteError(f"gradient norm {norm}: nothing to measure")
                    self.engine.update(norm)
                done += batches
        return done

    def timed(self, source: Source) -> dict[str, Any]:
        """Times a round: seconds until the last rank is done, phases of every rank, and work."""
        world = self.groups.world
        dist.barrier(group=world)
        begin = time.perf_counter()
        batches = self.round(source)
        if platform.device().type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        note = (seconds, self.phases.take(), self._work(batches, source), self.clock)
        notes: list = [None] * world.size()
        dist.all_gather_object(notes, note, group=world)
        work = {name: sum(note[2][name] for note in notes) for name in COUNTS}
        return {
            "seconds": max(note[0] for note in notes),
            "phases": [note[1] for note in notes],
            "work": work,
            "clock": {name: max(note[3][name] for note in notes) for name in self.clock},
        }

    def _work(self, batches: Sequence[Microbatch], source: Source) -> dict[str, float]:
        """Counts the work of this replica, on its reader, for all of its ranks."""
        found: dict[str, float] = dict.fromkeys(COUNTS, 0)
        for batch in batches if self.groups.is_reader else ():
            supervised = len(source.objective.positions(batch))
            found["samples"] += len(batch.samples)
            found["tokens"] += batch.num_real_tokens
            found["supervised"] += supervised
            found["tiles"] += batch.num_tiles
            found["model_flops"] += total(model_flops(self.run, batch, supervised))
        return found


def gemm_peak(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of ten, while other ranks do the same."""
    device = platform.device()
    cuda = device.type == "cuda"
    size = 8192 if cuda else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    best = math.inf
    for _ in range(10):
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.mm(a, b)
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def measure(
    run: RunConfig,
    groups: Groups,
    *,
    kinds: Sequence[str],
    routings: Sequence[str],
    rounds: int,
    warmup: int,
) -> dict[str, Any]:
    """Measures all sides in turn. Every rank calls it and gets the result."""
    dtype = torch.bfloat16 if run.training.bf16 else torch.float32
    peaks: list = [None] * groups.world.size()
    dist.barrier(group=groups.world)
    dist.all_gather_object(peaks, gemm_peak(dtype), group=groups.world)
    if platform.device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with Peak() as resident, Phases(groups) as phases:
        bench = Bench(run, groups, phases)
        sources = bench.sources(kinds, routings)
        if not sources:
            raise ConfigError(
                "balanced routes are given to mock data; allowed: --routing natural, or --data mock"
            )
        found: dict[str, list] = {name: [] for name in sources}
        try:
            for source in sources.values():
                for _ in range(warmup):
                    bench.timed(source)
            # Nothing is read ahead of a rollout.
            size, ahead = (1, 0) if declaration(run).generates else (STRETCH, 1)
            while any(len(done) < rounds for done in found.values()):
                for name, source in sources.items():
                    stretch = [bench.timed(source) for _ in range(size)][ahead:]
                    found[name] = (found[name] + stretch)[:rounds]
        finally:
            for source in sources.values():
                source.close()
    memory = _memory(groups, resident)
    parallel = to_dict(run.parallel) | {
        "world_size": groups.world.size(),
        "data_parallel_size": groups.pg.dp.size(),
    }
    return {
        "run": to_dict(run),
        "layout": parallel,
        "units": {"rank": "GPU" if platform.device().type == "cuda" else "CPU process"},
        "gemm_flops_per_second_per_rank": statistics.mean(peaks),
        "memory": memory,
        "sides": {name: _summary(done, sum(peaks), len(peaks)) for name, done in found.items()},
    }


def _memory(groups: Groups, resident: Peak) -> dict[str, Any]:
    """Peak memory of the rank that needs most: torch's allocator on a GPU, else the process."""
    mine = {"peak_resident_bytes": resident.bytes}
    if platform.device().type == "cuda":
        mine["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
        mine["peak_gpu_reserved_bytes"] = torch.cuda.max_memory_reserved()
    notes: list = [None] * groups.world.size()
    dist.all_gather_object(notes, mine, group=groups.world)
    return {name: max(note[name] for note in notes) for name in mine}


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "quartiles": list(quartiles(values))}


def _summary(rounds: list[dict[str, Any]], peak: float, ranks: int) -> dict[str, Any]:
    """Summarises one side. Phases are mean seconds per round, so that they add up; their mean and
    maximum over ranks."""
    speeds = {
        name: spread([r["work"][name] / r["seconds"] for r in rounds])
        for name in ("tokens", "supervised", "samples", "model_flops")
    }
    flops = speeds["model_flops"]["median"]
    names = sorted({name for r in rounds for of_rank in r["phases"] for name in of_rank})
    phases = {}
    for name in names:
        entry: dict[str, float] = {}
        for key in ("seconds", "calls", "bytes"):
            of_rank = [
                statistics.mean(r["phases"][rank].get(name, {}).get(key, 0) for r in rounds)
                for rank in range(ranks)
            ]
            if key == "seconds" or max(of_rank):
                entry[key] = statistics.mean(of_rank)
            if key == "seconds":
                entry["most"] = max(of_rank)
        phases[name] = entry
    timings = sorted({name for r in rounds for name in r["clock"]})
    return {
        "rounds": len(rounds),
        "seconds": spread([r["seconds"] for r in rounds])
        | {"mean": statistics.mean(r["seconds"] for r in rounds)},
        "tokens_per_second": speeds["tokens"],
        "supervised_tokens_per_second": speeds["supervised"],  # in RL: tokens of completions
        "samples_per_second": speeds["samples"],
        "tokens_per_second_per_rank": speeds["tokens"]["median"] / ranks,
        "model_tflops_per_second": flops / 1e12,
        "model_tflops_per_second_per_rank": flops / 1e12 / ranks,
        "mfu": flops / peak,
        "phases": phases,
        "rollout_seconds": {
            name.removeprefix("timing_s/"): statistics.median(
                r["clock"][name] for r in rounds if name in r["clock"]
            )
            for name in timings
        },
        "work": [r["work"] for r in rounds],
    }

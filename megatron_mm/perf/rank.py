"""Memory, work and traffic of one rank of a layout in a step."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass

from megatron_mm.config import RunConfig, data_parallel_size
from megatron_mm.data.batch import Microbatch
from megatron_mm.perf import memory
from megatron_mm.perf.fake import fake_engine, fake_job
from megatron_mm.perf.recorder import Link, Recorder, Work
from megatron_mm.perf.schedule import activation_peak, events
from megatron_mm.perf.standins import fused_norm, planned_backend
from megatron_mm.perf.trace import ChunkTrace, trace_chunk, trace_sync


@dataclass(frozen=True)
class RankPlan:
    """
    Attributes:
        pipeline: number of this rank in its pipeline, and how many there are.
        layers: the letters of each of its stages.
        elements: parameters held here, and how many of them are of routed experts.
        traces: of its stages.
        once: its work once a step, after the last microbatch.
        groups: the ranks of its groups, by role.
    """

    pipeline: tuple[int, int]
    layers: tuple[str, ...]
    elements: tuple[int, int]
    state: memory.State
    traces: tuple[ChunkTrace, ...]
    once: Work
    microbatches: int
    groups: dict[str, tuple[int, ...]]

    @property
    def activations(self) -> int:
        """Bytes at their peak."""
        order = events(*self.pipeline, len(self.traces), self.microbatches)
        return activation_peak(order, self.traces)

    @property
    def total(self) -> int:
        return self.state.total + self.activations

    @property
    def step(self) -> Work:
        """Everything that the rank does in a step but the optimizer's arithmetic."""
        both = sum((trace.forward + trace.backward for trace in self.traces), Work())
        work = both.times(self.microbatches) + self.once
        work.sent += Counter({Link("send", "pp"): self.microbatches * self._to_neighbours()})
        return work

    def _to_neighbours(self) -> int:
        return sum(trace.leaves + trace.arrives for trace in self.traces)


def plan_rank(
    run: RunConfig, rank: int, world_size: int, batch: Microbatch, kernels: str = "cuda"
) -> RankPlan:
    """Builds rank `rank`'s part of the model without memory and runs `batch` through it.

    Args:
        batch: every microbatch of the step is like it; on the CPU.
        kernels: `cuda` as on a GPU, `torch` as on the CPU.
    Raises:
        ConfigError: the planner cannot plan these settings.
    """
    replicas = data_parallel_size(run, world_size) * run.training.micro_batch_size
    with fake_job(run, rank, world_size) as groups:
        recorder = Recorder(groups.pg)
        engine = fake_engine(run, groups, planned_backend(run, kernels, recorder.add_flops))
        state = memory.planned(engine)
        chunks = range(len(engine.chunks))
        with fused_norm() if kernels == "cuda" else nullcontext():
            traces = tuple(trace_chunk(engine, recorder, chunk, batch) for chunk in chunks)
        params = [param for chunk in engine.chunks for param in chunk.parameters()]
        experts = sum(param.numel() for param in params if param.param_layout.expert)
        return RankPlan(
            pipeline=(groups.pg.pp.rank(), groups.pg.pp.size()),
            layers=tuple(chunk.letters for chunk in engine.chunks),
            elements=(sum(param.numel() for param in params), experts),
            state=state,
            traces=traces,
            once=trace_sync(engine, recorder),
            microbatches=run.training.global_batch_size // replicas,
            groups=recorder.groups(),
        )

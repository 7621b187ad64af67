"""Memory, work and traffic of one rank of a layout in a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from megatron_mm.config import RunConfig, data_parallel_size
from megatron_mm.data.batch import Microbatch
from megatron_mm.engine.objective import Objective
from megatron_mm.perf import memory
from megatron_mm.perf.assumed import paired
from megatron_mm.perf.encoder import EncoderTrace, dealt, trace_encoder
from megatron_mm.perf.fake import fake_engine, fake_job
from megatron_mm.perf.kernels import Kernel, Link, Work
from megatron_mm.perf.pairs import held_reference, pairs_batch
from megatron_mm.perf.recorder import Recorder
from megatron_mm.perf.rollout import (
    RolloutTrace,
    policy_batch,
    policy_objective,
    reinforced,
    trace_rollout,
)
from megatron_mm.perf.schedule import activation_peak, events
from megatron_mm.perf.standins import planned_backend
from megatron_mm.perf.trace import ChunkTrace, trace_chunk, trace_once
from megatron_mm.preference.objective import PreferenceObjective
from megatron_mm.rl.rewards.functions import reads_routes
from megatron_mm.rl.settings import records_routes
from megatron_mm.train.sft import SupervisedFineTuning

# Blackwell has its kernels too, as far as they are chosen by it.
HOPPER = (9, 0)


@dataclass(frozen=True)
class RankPlan:
    """
    Attributes:
        pipeline: number of this rank in its pipeline, and how many there are.
        layers: the letters of each of its stages.
        elements: parameters held here, and how many of them are of routed experts.
        trained: those of them that have gradients, in the same way.
        traces: of its stages.
        once: its kernels once a step, beside the microbatches.
        groups: the ranks of its groups, by role.
        rollout: its memory in one, with reinforcement learning.
        encoder: its share of the encoder, where that stands beside the pipeline.
        reference: bytes in host memory, with preference pairs: the reference's weights, and this
            model's while those are in place.
    """

    pipeline: tuple[int, int]
    layers: tuple[str, ...]
    elements: tuple[int, int]
    trained: tuple[int, int]
    state: memory.State
    traces: tuple[ChunkTrace, ...]
    once: Sequence[Kernel]
    microbatches: int
    groups: dict[str, tuple[int, ...]]
    rollout: RolloutTrace | None = None
    encoder: EncoderTrace | None = None
    reference: int = 0

    @property
    def activations(self) -> int:
        """Bytes at their peak."""
        order = events(*self.pipeline, len(self.traces), self.microbatches)
        in_schedule = activation_peak(order, self.traces)
        if self.encoder is None:
            return in_schedule
        # The buffer of gathered activations outlives the schedule.
        return max(in_schedule + self.encoder.leaves, self.encoder.peak + self.stays)

    @property
    def total(self) -> int:
        return self.state.total + self.beside_state

    @property
    def beside_state(self) -> int:
        """Bytes at the peak of a step, of training or of the rollout before it."""
        return max(self.activations, self.in_rollout)

    @property
    def in_rollout(self) -> int:
        """Bytes at the peak of a rollout, what training leaves behind included; 0 without one."""
        return self.rollout.peak + self.stays if self.rollout else 0

    @property
    def stays(self) -> int:
        """Bytes that training leaves behind for good, in a rollout too."""
        return sum(trace.stays for trace in self.traces)

    @property
    def step(self) -> Work:
        """Everything that the rank does in a step."""
        both = sum((trace.forward + trace.backward for trace in self.traces), Work())
        work = both.times(self.microbatches) + Work.of(self.once)
        if self.encoder is not None:
            work += self.encoder.forward + self.encoder.backward
        work.sent += Counter({Link("send", "pp"): self.microbatches * self._to_neighbours()})
        return work

    def _to_neighbours(self) -> int:
        return sum(trace.leaves + trace.arrives for trace in self.traces)


def plan_rank(
    run: RunConfig, rank: int, world_size: int, batch: Microbatch, kernels: str = "cuda"
) -> RankPlan:
    """Builds rank `rank`'s part of the model without memory and runs `batch` through it.

    Args:
        batch: every microbatch of the step is like it, and every microbatch of prompts; on the
            CPU.
        kernels: `cuda` as on a GPU, `torch` as on the CPU.
    Raises:
        ConfigError: the planner cannot plan these settings.
    """
    replicas = data_parallel_size(run, world_size) * run.training.micro_batch_size
    rl, dpo = reinforced(run), paired(run)
    # Before anything is fake: it may import reward functions.
    records = rl is not None and records_routes(rl, reads_routes(rl.reward_funcs))
    with fake_job(run, rank, world_size, HOPPER if kernels == "cuda" else None) as groups:
        recorder = Recorder(groups.pg, groups.encoder)
        engine = fake_engine(run, groups, planned_backend(run, kernels, recorder.add))
        state = memory.planned(engine)
        chunks = range(len(engine.chunks))
        objective: Objective = SupervisedFineTuning()
        given = batch
        if rl is not None:
            objective, given = policy_objective(rl), policy_batch(run, rl, batch)
        elif dpo is not None:
            objective, given = PreferenceObjective(dpo), pairs_batch(run, batch)
        microbatches = run.training.global_batch_size // replicas
        encoder = encoded = None
        if engine.encoder is not None:
            encoder, encoded = trace_encoder(engine.encoder, recorder, batch, microbatches)
            (given,) = dealt(given, 1, engine.encoder.owners)
        traces = tuple(
            trace_chunk(engine, recorder, chunk, given, objective, encoded) for chunk in chunks
        )
        rollout = None if rl is None else trace_rollout(engine, recorder, batch, records)
        params = [param for module in engine.modules for param in module.parameters()]
        trained = [param for param in params if param.requires_grad]
        return RankPlan(
            pipeline=(groups.pg.pp.rank(), groups.pg.pp.size()),
            layers=tuple(chunk.letters for chunk in engine.chunks),
            elements=_elements(params),
            trained=_elements(trained),
            state=state,
            traces=traces,
            once=trace_once(engine, recorder),
            microbatches=microbatches,
            groups=recorder.groups(),
            rollout=rollout,
            encoder=encoder,
            reference=0 if dpo is None else held_reference(engine),
        )


def _elements(params: Iterable[torch.nn.Parameter]) -> tuple[int, int]:
    """Numbers of elements: of all these, and of the routed experts among them."""
    sizes = [(param.numel(), param.param_layout.expert) for param in params]
    return sum(size for size, _ in sizes), sum(size for size, expert in sizes if expert)

"""From work to seconds on a named GPU: a prediction, with its assumptions beside it.

Collectives are rings: of n ranks each sends n - 1 of n parts. A group that leaves the NVLink
domain is as fast as the network adapters of its ranks in one domain, taken together; in an
all-to-all each rank sends its own part through its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_mm.config import RunConfig
from megatron_mm.perf.hardware import GPU, Assumptions
from megatron_mm.perf.rank import RankPlan
from megatron_mm.perf.recorder import Work
from megatron_mm.perf.schedule import Timeline, timeline

DATA_PARALLEL = ("dp", "dp_cp", "expt_dp", "intra_dp_cp", "intra_expt_dp")


@dataclass(frozen=True)
class Prediction:
    """Prediction of one step; times in seconds.

    Attributes:
        schedule: of forward and backward passes through the pipeline.
        gradients, parameters: exchange among replicas that nothing hides.
        update: the optimizer's own.
        stages: forward, backward of every stage for a microbatch.
        mfu: FLOPs of the model (three times those of its forward passes, or less where parts are
            frozen; nothing computed again) by the GPUs' peak.
    """

    schedule: Timeline
    gradients: float
    parameters: float
    update: float
    stages: tuple[tuple[float, float], ...]
    tokens_per_second_per_gpu: float
    mfu: float

    @property
    def seconds(self) -> float:
        return self.schedule.seconds + self.gradients + self.parameters + self.update


def predict(
    run: RunConfig, world_size: int, plans: Sequence[RankPlan], gpu: GPU, assumed: Assumptions
) -> Prediction:
    """
    Args:
        plans: of one rank of each pipeline rank, in order.
    """
    microbatches, ranks = plans[0].microbatches, len(plans)
    stages, wires = {}, {}
    for place, plan in enumerate(plans):
        for chunk, trace in enumerate(plan.traces):
            passes = [
                computing(work, gpu, assumed) + talking(work, plan.groups, gpu, assumed)
                for work in (trace.forward, trace.backward)
            ]
            stages[chunk * ranks + place] = passes[0], passes[1]
            apart = plan.groups.get("pp", ())[:2]
            wires[chunk * ranks + place] = collective("send", trace.leaves, apart, gpu, assumed)
    order = sorted(stages)
    forward, backward = zip(*(stages[stage] for stage in order), strict=True)
    run_through = timeline(ranks, microbatches, forward, backward, [wires[s] for s in order])
    gradients = parameters = update = 0.0
    for place, plan in enumerate(plans):
        reduce, gather, rest = exchanged(plan, gpu, assumed)
        mine = range(place, len(order), ranks)
        if run.parallel.overlap_grad_reduce:  # behind the last microbatch
            reduce = max(0.0, reduce - sum(backward[stage] for stage in mine))
        if run.parallel.overlap_param_gather:  # behind the first
            gather = max(0.0, gather - sum(forward[stage] for stage in mine))
        gradients, parameters = max(gradients, reduce + rest), max(parameters, gather)
        touched = 2 * plan.state.optimizer + plan.state.gradients
        update = max(update, touched / (gpu.bandwidth * assumed.bandwidth))
    seconds = run_through.seconds + gradients + parameters + update
    tokens = run.training.global_batch_size * run.data.seq_length
    model = sum(model_flops(plan) for plan in plans) * microbatches * world_size / ranks
    return Prediction(
        run_through,
        gradients,
        parameters,
        update,
        tuple(stages[stage] for stage in order),
        tokens / seconds / world_size,
        model / (seconds * world_size * gpu.bf16_flops),
    )


def model_flops(plan: RankPlan) -> int:
    """FLOPs of a microbatch on one rank, nothing computed twice."""
    return sum(
        min(3 * trace.forward.flops, trace.forward.flops + trace.backward.flops)
        for trace in plan.traces
    )


def computing(work: Work, gpu: GPU, assumed: Assumptions) -> float:
    """Seconds without communication."""
    products = work.flops / (gpu.bf16_flops * assumed.compute)
    others = work.moved / (gpu.bandwidth * assumed.bandwidth)
    return max(products + others, work.launches * assumed.launch)


def talking(
    work: Work, groups: Mapping[str, Sequence[int]], gpu: GPU, assumed: Assumptions
) -> float:
    """Seconds of collectives, one after the other."""
    return sum(
        collective(link.kind, size, groups.get(link.group, ()), gpu, assumed)
        for link, size in work.sent.items()
    )


def exchanged(plan: RankPlan, gpu: GPU, assumed: Assumptions) -> tuple[float, float, float]:
    """Seconds of (gradients among replicas, parameters among replicas, the rest) once a step."""
    found = {"reduce": 0.0, "gather": 0.0, "rest": 0.0}
    for link, size in plan.once.sent.items():
        took = collective(link.kind, size, plan.groups.get(link.group, ()), gpu, assumed)
        part = "gather" if link.kind == "all_gather" else "reduce"
        found[part if link.group in DATA_PARALLEL else "rest"] += took
    return found["reduce"], found["gather"], found["rest"]


def collective(kind: str, size: int, ranks: Sequence[int], gpu: GPU, assumed: Assumptions) -> float:
    """Seconds that `size` bytes given by each of these ranks take."""
    count = len(ranks)
    if count < 2 or not size:
        return 0.0
    domains = {rank // gpu.domain for rank in ranks}
    near = -(-count // len(domains))  # ranks of the group in one NVLink domain
    nvlink, network = gpu.nvlink * assumed.links, gpu.network * assumed.links
    if kind == "all_to_all":
        inside, outside = size * (near - 1) / count, size * (count - near) / count
        return max(inside / nvlink, outside / network)
    speed = nvlink if len(domains) == 1 else min(nvlink, near * network)
    parts = {"all_gather": count - 1, "all_reduce": 2 * (count - 1) / count}
    parts |= {"reduce_scatter": (count - 1) / count}
    return size * parts.get(kind, 1.0) / speed


def fits(plan: RankPlan, gpu: GPU, assumed: Assumptions) -> bool:
    return plan.total <= room(gpu, assumed)


def room(gpu: GPU, assumed: Assumptions) -> float:
    """Bytes of a GPU that state and activations may have."""
    return gpu.memory * (1 - assumed.reserved)

"""From kernels to seconds on a named GPU: a prediction, with its assumptions beside it.

The host launches one kernel after the other and runs ahead of the device; the device begins each
when it is launched and the one before is done; where the host waits for a result, it launches the
next only after the device is done. So launches cost where the device would be idle, and nowhere
else: a row of small kernels behind a large one is hidden, the same row behind a wait is not.

Collectives are rings: of n ranks each sends n - 1 of n parts. A group that leaves the NVLink
domain is as fast as the network adapters of its ranks in one domain, taken together; in an
all-to-all each rank sends its own part through its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from megatron_mm.config import RunConfig
from megatron_mm.perf.assumed import samples_of_one
from megatron_mm.perf.hardware import GPU, Assumptions
from megatron_mm.perf.kernels import Kernel, Work
from megatron_mm.perf.rank import RankPlan
from megatron_mm.perf.schedule import Timeline, timeline

DATA_PARALLEL = ("dp", "dp_cp", "expt_dp", "intra_dp_cp", "intra_expt_dp")
BESIDE = ("encoder_dp",)  # the encoder's: nothing hides their exchange
Groups = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Terms:
    """Seconds of a device, by what it does.

    Attributes:
        products: matrix products and attention.
        elementwise: everything else on one GPU, whose time is that of its memory.
        collectives: that nothing hides.
        idle: it waits for the host to launch.
    """

    products: float = 0.0
    elementwise: float = 0.0
    collectives: float = 0.0
    idle: float = 0.0

    @property
    def seconds(self) -> float:
        return self.products + self.elementwise + self.collectives + self.idle

    def __add__(self, other: Terms) -> Terms:
        return Terms(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, count: int) -> Terms:
        return Terms(*(count * getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Prediction:
    """Prediction of one step; times in seconds.

    Attributes:
        schedule: of forward and backward passes through the pipeline.
        terms: of those passes on each pipeline rank, in a step.
        gradients, parameters: exchange among replicas that nothing hides.
        update: everything else once a step: gradients cleared, their norm, the optimizer.
        stages: forward, backward of every stage for a microbatch.
        encoder: encoding before the schedule, and after it, where the encoder stands beside the
            pipeline; 0 otherwise.
        mfu: FLOPs of the model (forward, and backward for what learns; nothing computed again)
            by the GPUs' peak in the run's precision.
    """

    schedule: Timeline
    terms: tuple[Terms, ...]
    gradients: float
    parameters: float
    update: Terms
    stages: tuple[tuple[float, float], ...]
    tokens_per_second_per_gpu: float
    mfu: float
    encoder: tuple[float, float] = (0.0, 0.0)

    @property
    def seconds(self) -> float:
        exchange = self.gradients + self.parameters
        return self.schedule.seconds + sum(self.encoder) + exchange + self.update.seconds

    @property
    def by_term(self) -> dict[str, float]:
        """Seconds of the step on the busiest rank, by term; their sum is the step."""
        busiest = max(self.terms, key=lambda terms: terms.seconds)
        return {
            **{field.name: getattr(busiest, field.name) for field in fields(busiest)},
            "bubble": round(
                max(0.0, self.schedule.seconds - busiest.seconds), 9
            ),  # no rounding errors
            "encoding": self.encoder[0],
            "encoder_gradients": self.encoder[1],
            "gradients": self.gradients,
            "parameters": self.parameters,
            "optimizer": self.update.seconds,
        }


def predict(
    run: RunConfig, world_size: int, plans: Sequence[RankPlan], gpu: GPU, assumed: Assumptions
) -> Prediction:
    """
    Args:
        plans: of one rank of each pipeline rank, in order.
    """
    microbatches, ranks = plans[0].microbatches, len(plans)
    stages, wires, terms = {}, {}, []
    for place, plan in enumerate(plans):
        whole = Terms()
        for chunk, trace in enumerate(plan.traces):
            passes = [played(kernels, plan.groups, gpu, assumed) for kernels in trace.kernels]
            stages[chunk * ranks + place] = passes[0].seconds, passes[1].seconds
            whole += (passes[0] + passes[1]).times(microbatches)
            apart = plan.groups.get("pp", ())[:2]
            wires[chunk * ranks + place] = collective("send", trace.leaves, apart, gpu, assumed)
        terms.append(whole)
    order = sorted(stages)
    forward, backward = zip(*(stages[stage] for stage in order), strict=True)
    run_through = timeline(ranks, microbatches, forward, backward, [wires[s] for s in order])
    gradients = parameters = 0.0
    updates = []
    for place, plan in enumerate(plans):
        reduce, gather = exchanged(plan, gpu, assumed)
        mine = range(place, len(order), ranks)
        if run.parallel.overlap_grad_reduce:  # behind the last microbatch
            reduce = max(0.0, reduce - sum(backward[stage] for stage in mine))
        if run.parallel.overlap_param_gather:  # behind the first
            gather = max(0.0, gather - sum(forward[stage] for stage in mine))
        also = exchanged(plan, gpu, assumed, BESIDE)
        gradients, parameters = max(gradients, reduce + also[0]), max(parameters, gather + also[1])
        own = (kernel for kernel in plan.once if not _among_replicas(kernel))
        updates.append(played(own, plan.groups, gpu, assumed))
    update = max(updates, key=lambda terms: terms.seconds)
    encoder = _encoder(plans, gpu, assumed)
    seconds = run_through.seconds + sum(encoder) + gradients + parameters + update.seconds
    tokens = run.training.global_batch_size * samples_of_one(run) * run.data.seq_length
    model = sum(step_flops(plan) for plan in plans) * world_size / ranks
    return Prediction(
        run_through,
        tuple(terms),
        gradients,
        parameters,
        update,
        tuple(stages[stage] for stage in order),
        tokens / seconds / world_size,
        model / (seconds * world_size * gpu.peak(fp32=not run.training.bf16)),
        encoder,
    )


def _encoder(plans: Sequence[RankPlan], gpu: GPU, assumed: Assumptions) -> tuple[float, float]:
    """Seconds of the encoder's two passes beside the pipeline, on the busiest rank."""
    longest = [0.0, 0.0]
    for plan in plans:
        if plan.encoder is not None:
            for number, kernels in enumerate(plan.encoder.kernels):
                took = played(kernels, plan.groups, gpu, assumed).seconds
                longest[number] = max(longest[number], took)
    return longest[0], longest[1]


def step_flops(plan: RankPlan) -> int:
    """FLOPs of a step on one rank, nothing computed twice."""
    of_stages = sum(trace.model_flops for trace in plan.traces)
    beside = 0 if plan.encoder is None else plan.encoder.model_flops
    return of_stages * plan.microbatches + beside


def played(kernels: Iterable[Kernel], groups: Groups, gpu: GPU, assumed: Assumptions) -> Terms:
    """Plays kernels on a device that has nothing else to do when the first is launched. A product
    takes the longer of computing and of reading its operands."""
    bandwidth = gpu.bandwidth * assumed.bandwidth
    host = device = products = elementwise = collectives = 0.0
    for kernel in kernels:
        if kernel.launched:
            host += assumed.launch
        if kernel.link is not None:
            ranks = groups.get(kernel.link.group, ())
            took = collective(kernel.link.kind, kernel.moved, ranks, gpu, assumed)
            collectives += took
        elif kernel.flops:
            peak = gpu.peak(kernel.fp32) * assumed.compute
            took = max(kernel.flops / peak, kernel.moved / bandwidth)
            products += took
        else:
            took = kernel.moved / bandwidth
            elementwise += took
        device = max(device, host) + took if kernel.launched else device
        if kernel.waits:
            host = max(host, device) + assumed.wait
    idle = max(0.0, device - products - elementwise - collectives)  # rounding
    return Terms(products, elementwise, collectives, idle)


def roughly(work: Work, groups: Groups, gpu: GPU, assumed: Assumptions) -> float:
    """Seconds of work whose order is not known: the host hides behind the device, or the device
    behind the host."""
    products = (work.flops - work.fp32) / (gpu.bf16_flops * assumed.compute)
    products += work.fp32 / (gpu.fp32_flops * assumed.compute)
    others = work.moved / (gpu.bandwidth * assumed.bandwidth)
    talking = sum(
        collective(link.kind, size, groups.get(link.group, ()), gpu, assumed)
        for link, size in work.sent.items()
    )
    host = work.launches * assumed.launch
    return max(products + others + talking, host) + work.waits * assumed.wait


def _among_replicas(kernel: Kernel) -> bool:
    return kernel.link is not None and kernel.link.group in (*DATA_PARALLEL, *BESIDE)


def exchanged(
    plan: RankPlan, gpu: GPU, assumed: Assumptions, among: Sequence[str] = DATA_PARALLEL
) -> tuple[float, float]:
    """Seconds that gradients, and parameters, take among replicas once a step.

    Args:
        among: the groups that count.
    """
    reduce = gather = 0.0
    for link, size in Work.of(filter(_among_replicas, plan.once)).sent.items():
        if link.group not in among:
            continue
        took = collective(link.kind, size, plan.groups.get(link.group, ()), gpu, assumed)
        if link.kind == "all_gather":
            gather += took
        else:
            reduce += took
    return reduce, gather


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

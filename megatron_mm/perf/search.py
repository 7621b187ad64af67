"""Search for the layouts of a run that fit, and for the fastest of them, as predicted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from math import gcd
from typing import Literal, Protocol

from megatron_mm.config import ConfigError, RunConfig, TrainingConfig, model_stages, validate
from megatron_mm.config.settings import RecomputeModule
from megatron_mm.perf.hardware import GPU, Assumptions
from megatron_mm.perf.layout import LayoutPlan, most_sequences, on_gpus, plan_layout
from megatron_mm.perf.pieces import Pieces, rough_rank, trace_pieces
from megatron_mm.perf.predict import BESIDE, exchanged, room, roughly
from megatron_mm.perf.rank import RankPlan
from megatron_mm.perf.standins import check_backend

SECONDS = 240  # of the processor for layouts in full; then the answer is what fits so far
PATIENCE = 4  # times as long until something fits
ROUGH = 1.15  # rough plans may need this many times the room; full plans decide
LONG = 32768  # tokens of a sample from which on context parallelism is tried
# Modules are for selective recompute; `validate` wants the default ones beside another.
RECOMPUTE: tuple[tuple[Literal["full", "selective"] | None, list[RecomputeModule] | None], ...] = (
    (None, None),
    ("selective", ["core_attn", "vision"]),
    ("selective", ["moe", "vision"]),
    ("full", None),
)


class Progress(Protocol):
    total: float | None

    def update(self, n: float | None = 1) -> object: ...

    def set_description(self, desc: str | None = None) -> object: ...


@dataclass(frozen=True)
class Found:
    """
    Attributes:
        plans: those that fit, fastest first.
        considered, fitting: layouts that divide; those of them that fit, roughly.
    """

    plans: list[LayoutPlan]
    considered: int
    fitting: int


@dataclass
class _Refused:
    """Summary of the layouts that do not fit.

    Attributes:
        able: bytes that a GPU has.
        leanest: the fewest bytes that one of them needs.
        trains: training fits in one of them, its rollout does not.
        sequences: the largest max_num_seqs with which one of these would fit, 0 for none.
    """

    able: float
    leanest: float = float("inf")
    trains: bool = False
    sequences: int = 0

    def add(self, needed: float, ranks: Sequence[RankPlan]) -> None:
        self.leanest = min(self.leanest, needed)
        trains = all(rank.state.total + rank.activations <= self.able for rank in ranks)
        if trains and ranks[0].rollout is not None:
            self.trains = True
            self.sequences = max(self.sequences, most_sequences(ranks, self.able))

    def error(self, seen: str, world_size: int, gpu: GPU) -> ConfigError:
        advice = (
            f"a larger --world-size than {world_size}, a GPU with more memory, or a shorter "
            "seq_length"
        )
        if self.sequences:
            advice = f"--max-num-seqs of about {self.sequences} or fewer, {advice}"
        elif self.trains:  # but not even one group of completions
            advice = f"fewer num_generations, {advice}"
        return ConfigError(
            f"{seen}: the leanest needs about {self.leanest / 1e9:.1f} GB a GPU, a {gpu.name} has "
            f"{self.able / 1e9:.1f}; allowed: {advice}"
        )


def search(
    run: RunConfig,
    world_size: int,
    gpu: GPU,
    assumed: Assumptions,
    images: int,
    supervised: float,
    top: int,
    progress: Progress,
) -> Found:
    """Tries layouts, micro batch sizes and recompute; everything else is the run's.

    Raises:
        ConfigError: the run cannot be planned, no layout divides, or none fits.
    """
    check_backend(run)
    tried = list(candidates(run, world_size, gpu))
    if not tried:
        validate(run, world_size)  # explains why the run's own layout is none of them
        raise ConfigError(
            f"no layout of {world_size} ranks divides global_batch_size "
            f"{run.training.global_batch_size}; allowed: another --world-size or batch"
        )
    pieces: dict[tuple, Pieces] = {}
    progress.total = len({_key(candidate) for candidate in tried}) + top
    progress.set_description("sub-layers")
    ranked: list[tuple[float, int, int, RunConfig]] = []
    able = room(gpu, assumed)
    refused = _Refused(able)
    for candidate in sorted(tried, key=_key):
        key = _key(candidate)
        if key not in pieces:
            one = deepcopy(candidate)
            # The largest power of two, up to 32, that divides the experts.
            one.parallel.expert_model_parallel_size = gcd(32, run.model.language.num_experts)
            pieces[key] = trace_pieces(one, images, supervised)
            progress.update()
        ranks = _rough(candidate, world_size, pieces[key])
        needed = max(rank.total for rank in ranks)
        if needed <= ROUGH * able:
            seconds = _seconds(candidate, ranks, gpu, assumed)
            ranked.append((seconds, len(ranked), needed, candidate))
        else:
            refused.add(needed, ranks)
    ranked.sort()
    progress.set_description("layouts")
    plans: list[LayoutPlan] = []
    off: dict[tuple, float] = {}  # how far off the rough memory was, by split
    late, begin = False, time.process_time()
    for _, _, needed, candidate in ranked:
        limit = SECONDS if plans else PATIENCE * SECONDS
        late = bool(off) and time.process_time() - begin > limit  # one at least is traced
        if len(plans) == top or late:
            break
        corrected = needed * off.get(_key(candidate), 0.0)
        if corrected > able:
            refused.leanest = min(refused.leanest, corrected)
            continue
        plan = plan_layout(candidate, world_size, gpu, assumed, images, supervised)
        off[_key(candidate)] = plan.peak / needed
        if plan.fits:
            plans.append(plan)
            progress.update()
        else:
            refused.add(plan.peak, plan.ranks)
    if not plans:
        seen = f"none of {len(tried)} layouts fits"
        if late:
            seen = (
                f"no layout was found to fit in {PATIENCE * SECONDS} s, not all of {len(ranked)} "
                "were traced"
            )
        raise refused.error(seen, world_size, gpu)
    plans.sort(key=lambda plan: plan.prediction.seconds)
    return Found(plans, len(tried), len(ranked))


def candidates(run: RunConfig, world_size: int, gpu: GPU) -> Iterator[RunConfig]:
    """Yields every layout that `validate` accepts, of sizes that are powers of two, with the
    encoder in the first stage and beside the pipeline, and each with every recompute. Routed
    experts are not split among tensor-parallel ranks, which then hold more of them instead.

    A layout that does not work with the run's own recompute is left out: its sizes do not divide,
    or the run cannot work at all. No recompute depends on a size, so the first layout that works
    must work with every one; an error there is told.
    """
    checked = False
    experts = run.model.language.num_experts
    contexts = (1, 2, 4, 8) if run.data.seq_length >= LONG else (1,)
    ways: tuple[Literal["stage", "replica"], ...] = ("stage",)
    if run.model.vision is not None:
        ways = ("stage", "replica")
    for tp, pp, vpp, ep, cp, micro, vision in product(
        (1, 2, 4, 8),
        (1, 2, 4, 8, 16, 32),
        (None, 2),
        [2**n for n in range(8) if 2**n <= min(experts, world_size)],
        contexts,
        (1, 2),
        ways,
    ):
        if tp > gpu.domain or (vpp and pp == 1) or _odd(world_size, tp * pp * cp, ep * pp):
            continue
        if vision == "replica" and pp == 1:  # the ranks of its only stage share the tiles already
            continue
        made = deepcopy(run)
        par, made.training.micro_batch_size = made.parallel, micro
        par.tensor_model_parallel_size, par.pipeline_model_parallel_size = tp, pp
        par.virtual_pipeline_model_parallel_size, par.context_parallel_size = vpp, cp
        par.expert_model_parallel_size, par.expert_tensor_parallel_size = ep, 1
        par.pipeline_model_parallel_layout, par.overlap_p2p_comm = None, None
        par.vision_parallel, par.vision_tensor_parallel_size = vision, None
        try:
            validate(made, world_size)
        except ConfigError:
            continue
        for granularity, modules in RECOMPUTE:
            one = _recomputing(made, granularity, modules)
            if not checked:
                validate(one, world_size)
            yield on_gpus(one, world_size)
        checked = True


def _recomputing(
    run: RunConfig,
    granularity: Literal["full", "selective"] | None,
    modules: list[RecomputeModule] | None,
) -> RunConfig:
    """The run with this recompute. The number of layers is the run's own where it matters."""
    made, usual = deepcopy(run), TrainingConfig()
    train = made.training
    train.recompute_granularity = granularity
    train.recompute_modules = list(usual.recompute_modules if modules is None else modules)
    if granularity != "full":
        train.recompute_num_layers = usual.recompute_num_layers
    return made


def _odd(world_size: int, *parts: int) -> bool:
    """Whether the world does not divide; rejects most of the product without a copy."""
    return any(world_size % part for part in parts)


def _key(run: RunConfig) -> tuple:
    """The settings that decide the cost of a sub-layer."""
    par, train = run.parallel, run.training
    recompute = str(train.recompute_granularity), *train.recompute_modules
    return par.tensor_model_parallel_size, par.context_parallel_size, recompute


def _rough(run: RunConfig, world_size: int, pieces: Pieces) -> list[RankPlan]:
    stages = list(model_stages(run))
    ranks = run.parallel.pipeline_model_parallel_size
    return [rough_rank(run, world_size, stages, place, pieces) for place in range(ranks)]


def _seconds(run: RunConfig, ranks: list[RankPlan], gpu: GPU, assumed: Assumptions) -> float:
    """Rough seconds of a step: the busiest rank's work, and the others' while the pipeline
    fills."""
    busy, exchange = [], 0.0
    for rank in ranks:
        works = [work for trace in rank.traces for work in (trace.forward, trace.backward)]
        busy.append(sum(roughly(work, rank.groups, gpu, assumed) for work in works))
        reduce, gather = exchanged(rank, gpu, assumed)
        if run.parallel.overlap_grad_reduce:
            reduce = max(0.0, reduce - busy[-1] * 2 / 3)
        if run.parallel.overlap_param_gather:
            gather = max(0.0, gather - busy[-1] / 3)
        exchange = max(exchange, reduce + gather)
    chunks = len(ranks[0].traces)
    filling = (sum(busy) - max(busy)) / chunks
    beside = 0.0
    if ranks[0].encoder is not None:
        works = [ranks[0].encoder.forward, ranks[0].encoder.backward]
        beside = sum(roughly(work, ranks[0].groups, gpu, assumed) for work in works)
        beside += sum(exchanged(ranks[0], gpu, assumed, BESIDE))
    return ranks[0].microbatches * max(busy) + filling + exchange + beside

"""A whole layout: one rank of every pipeline rank, planned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_mm.config import (
    ConfigError,
    RunConfig,
    look_memories,
    model_stages,
    validate,
    wire,
)
from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.config.vision_parallel import decided
from megatron_mm.engine.optimizer import overlap_settings
from megatron_mm.perf.assumed import planned_batch
from megatron_mm.perf.hardware import GPU, Assumptions
from megatron_mm.perf.predict import Prediction, fits, predict, room
from megatron_mm.perf.rank import RankPlan, plan_rank


@dataclass(frozen=True)
class LayoutPlan:
    run: RunConfig
    world_size: int
    gpu: GPU
    assumed: Assumptions
    ranks: tuple[RankPlan, ...]
    prediction: Prediction

    @property
    def peak(self) -> int:
        """Bytes on the fullest GPU."""
        return max(rank.total for rank in self.ranks)

    @property
    def fits(self) -> bool:
        return all(fits(rank, self.gpu, self.assumed) for rank in self.ranks)


def plan_layout(
    run: RunConfig,
    world_size: int,
    gpu: GPU,
    assumed: Assumptions,
    images: int = 1,
    supervised: float = 1.0,
    done: Callable[[], None] = lambda: None,
) -> LayoutPlan:
    """
    Args:
        images, supervised: of the batch, see `planned_batch`.
        done: called as every pipeline rank is planned.
    Raises:
        ConfigError: the layout does not work, or the planner does not know it.
    """
    validate(run, world_size)
    run = on_gpus(run, world_size)
    batch = planned_batch(run, images, supervised)
    ranks, made, found = run.parallel.pipeline_model_parallel_size, {}, []
    for place in range(ranks):
        alike = _what_it_holds(run, place)
        if alike not in made:
            made[alike] = plan_rank(run, place * (world_size // ranks), world_size, batch)
        found.append(replace(made[alike], pipeline=(place, ranks)))
        done()
    prediction = predict(run, world_size, found, gpu, assumed)
    return LayoutPlan(run, world_size, gpu, assumed, tuple(found), prediction)


def on_gpus(run: RunConfig, world_size: int) -> RunConfig:
    """The run with what GPUs make of settings that are left open."""
    run = decided(run)
    parallel = run.parallel
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    reduce, gather = overlap_settings(parallel, hides=world_size > ranks)
    overlapped = replace(parallel, overlap_grad_reduce=reduce, overlap_param_gather=gather)
    return replace(run, parallel=overlapped)


def too_large(plan: LayoutPlan) -> ConfigError:
    """The error for a layout that does not fit."""
    worst = max(range(len(plan.ranks)), key=lambda place: plan.ranks[place].total)
    rank, gb = plan.ranks[worst], 1e9
    held, able = rank.total / gb, room(plan.gpu, plan.assumed) / gb
    parts = f"{rank.state.total / gb:.1f} state, {rank.activations / gb:.1f} activations"
    if rank.rollout is not None:
        parts += f" or {rank.in_rollout / gb:.1f} rollout"
    most = most_sequences(plan.ranks, able * gb) if rank.rollout is not None else 0
    if most and rank.state.total + rank.activations <= room(plan.gpu, plan.assumed):
        advice = f"--max-num-seqs {most} or fewer"
    elif rank.state.total > rank.beside_state:
        advice = "more tensor, pipeline or expert parallel ranks"
    elif rank.beside_state == rank.activations:
        advice = "--recompute-granularity full, or more tensor or context parallel ranks"
    else:
        advice = "fewer num_generations, a shorter seq_length, or more tensor parallel ranks"
    return ConfigError(
        f"pipeline rank {worst} of {len(plan.ranks)} needs {held:.1f} GB ({parts}), a "
        f"{plan.gpu.name} has {able:.1f}; allowed: {advice}"
    )


def most_sequences(ranks: Sequence[RankPlan], able: float) -> int:
    """The largest max_num_seqs whose rollout fits on every rank; 0 if none does.

    Args:
        ranks: one of every pipeline rank, with a rollout.
        able: bytes that a rank has.
    """
    found = (
        rank.rollout.most_rows(able - rank.state.total - rank.stays)
        for rank in ranks
        if rank.rollout is not None
    )
    return int(min(found))  # the last stage draws for all rows, so there is a limit


def _what_it_holds(run: RunConfig, place: int) -> tuple:
    """Returns a value that is equal for pipeline ranks that hold and exchange the same."""
    stages, reads = model_stages(run), look_memories(run.model)
    between = [None, *wire(stages, [memory.name for memory in reads]), None]
    ranks = run.parallel.pipeline_model_parallel_size
    return tuple(
        (
            "".join(layer.kind for layer in stages[index].layers),
            tuple(
                reads[layer.known_reader]
                for layer in stages[index].layers
                if LAYERS[layer.kind].reads_memory
            ),
            _contents(between[index]),
            _contents(between[index + 1]),
        )
        for index in range(place, len(stages), ranks)
    )


def _contents(manifest) -> tuple | None:
    return None if manifest is None else (manifest.memories, len(manifest.refinements))

"""Costs of single sub-layers, and rough plans of whole layouts put together from them.

They serve a search, where tracing every layout would take hours. Each letter of the pattern is
traced as a pipeline stage of its own, once for each way to split and to recompute it; a stage of a
layout is then about the sum of its letters. Rough: a letter's neighbours, padding of buffers and
the fold of recomputed blocks are left out. The layouts that a search shows in the end are traced
in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

from megatron_mm.config import (
    Layer,
    RunConfig,
    Stage,
    effective_pattern,
    look_memories,
    parse_pattern,
    read_memories,
)
from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.perf.assumed import planned_batch
from megatron_mm.perf.encoder import EncoderTrace, rough_encoder
from megatron_mm.perf.kernels import Kernel, Link, Work
from megatron_mm.perf.memory import State
from megatron_mm.perf.rank import RankPlan, plan_rank
from megatron_mm.perf.rollout import reinforced, rough_rollout
from megatron_mm.perf.trace import ChunkTrace

FIRST, LAST = "first", "last"
BESIDE = "first, encoder beside"  # FIRST without the encoder


@dataclass(frozen=True)
class Pieces:
    """Plans of single stages, for one split and recompute; a microbatch is one sample.

    Attributes:
        plans: letter (with its memory, if it reads one), or FIRST and LAST for what only the first
            and the last stage have -> its plan as a stage.
        expert_ranks: ranks that the routed experts of a layer were dealt to.
        encoder: the encoder beside a pipeline, for one sample; None without images.
    """

    plans: dict[str, RankPlan]
    expert_ranks: int
    encoder: EncoderTrace | None


def trace_pieces(run: RunConfig, images: int, supervised: float) -> Pieces:
    """
    Args:
        run: its tensor, context and expert parallel sizes and its recompute count; pipeline and
            micro batch do not.
    """
    read = [memory.name for memory in read_memories(run.model)]
    pattern = _one_of_each(effective_pattern(run.model), len(read))
    layers = parse_pattern(pattern)
    readers = sum(LAYERS[layer.kind].reads_memory for layer in layers)
    reads = [read[number % len(read)] for number in range(readers)]
    small = deepcopy(run)
    small.model.hybrid_layer_pattern, small.model.fusion.look_memories = pattern, reads
    par = small.parallel
    par.pipeline_model_parallel_size = len(pattern) + 2
    par.virtual_pipeline_model_parallel_size = None
    par.pipeline_model_parallel_layout = "|" + "|".join(pattern) + "|"
    par.vision_parallel = "stage"
    small.training.micro_batch_size = 1
    shards = par.tensor_model_parallel_size * par.context_parallel_size
    per_stage = max(shards, par.expert_model_parallel_size)
    world = per_stage * par.pipeline_model_parallel_size
    small.training.global_batch_size = per_stage // shards
    batch = planned_batch(small, images, supervised)
    wanted = {FIRST: 0, LAST: len(pattern) + 1}
    for place, layer in enumerate(layers, start=1):
        wanted.setdefault(_piece(layer, reads), place)
    plans = {
        name: plan_rank(small, place * per_stage, world, batch) for name, place in wanted.items()
    }
    encoder = None
    if run.model.vision is not None:
        beside = deepcopy(small)
        beside.parallel.vision_parallel = "replica"
        plans[BESIDE] = plan_rank(beside, 0, world, batch)
        beside.parallel.pipeline_model_parallel_size = 1
        beside.parallel.pipeline_model_parallel_layout = None
        encoder = plan_rank(beside, 0, per_stage, batch).encoder
    return Pieces(plans, par.expert_model_parallel_size, encoder)


def _piece(layer: Layer, reads: Sequence[str]) -> str:
    """The name of a layer's piece: its letter, and the memory that it reads."""
    reader = LAYERS[layer.kind].reads_memory
    return f"{layer.kind} {reads[layer.known_reader]}" if reader else layer.kind


def _one_of_each(pattern: str, memories: int) -> str:
    """A pattern with every letter of this one, as short as it can be; letters that read a memory
    stand once for each."""
    kinds = LAYERS.used(pattern)

    def pairs(key: str) -> str:
        opens, closes = (
            [k.letter for k in kinds if k.pair == side and k.key == key]
            for side in ("opens", "closes")
        )
        return together([letter for letter in opens for _ in range(memories)], closes)

    def together(first: list[str], second: list[str]) -> str:
        """Both lists, in turns; the shorter one repeats its last letter."""
        places = range(max(len(first), len(second)))
        turns = ((letters, at) for at in places for letters in (first, second))
        return "".join(letters[min(at, len(letters) - 1)] for letters, at in turns)

    roles = [[k.letter for k in kinds if k.role == role] for role in ("mixer", "ffn")]
    keys = dict.fromkeys(kind.key for kind in kinds if kind.pair)
    return together(*roles) + "".join(map(pairs, keys))


def rough_rank(
    run: RunConfig, world_size: int, stages: list[Stage], place: int, pieces: Pieces
) -> RankPlan:
    """Pipeline rank `place` of a layout whose stages are these, from pieces of its split."""
    par, train = run.parallel, run.training
    ranks = par.pipeline_model_parallel_size
    shards = par.tensor_model_parallel_size * par.context_parallel_size
    replicas = world_size // (ranks * shards)
    reads = [memory.name for memory in look_memories(run.model)]
    mine, traces = stages[place::ranks], []
    beside = par.vision_parallel == "replica"
    found: list[RankPlan] = []
    for stage in mine:
        names = [_piece(layer, reads) for layer in stage.layers]
        names = (
            [BESIDE if beside else FIRST] * (stage.index == 0)
            + names
            + [LAST] * (stage.index == len(stages) - 1)
        )
        in_it = [pieces.plans[name] for name in names]
        traces.append(_together([plan.traces[0] for plan in in_it], run))
        found += in_it
    # One buffer of gathered activations serves all stages of a rank.
    stays = train.micro_batch_size * max(plan.stays for plan in found)
    traces[0] = replace(traces[0], stays=stays)

    def spread(experts: int) -> int:
        return experts * pieces.expert_ranks // par.expert_model_parallel_size

    held_experts = spread(sum(plan.elements[1] for plan in found))
    held = sum(plan.elements[0] - plan.elements[1] for plan in found) + held_experts
    expert = spread(sum(plan.trained[1] for plan in found))
    dense = sum(plan.trained[0] - plan.trained[1] for plan in found)
    # Every rank holds the encoder, and the first stage's piece has it as well.
    held -= sum(plan.encoder.elements for plan in found if plan.encoder is not None)
    dense -= sum(plan.encoder.trained for plan in found if plan.encoder is not None)
    encoder, microbatches = None, train.global_batch_size // (replicas * train.micro_batch_size)
    if beside:
        assert pieces.encoder is not None  # `validate` wants images for it
        samples = microbatches * train.micro_batch_size
        encoder = rough_encoder(pieces.encoder, samples, ranks, place == 0)
    of_encoder = 0 if encoder is None else encoder.trained
    in_stage = world_size // ranks
    expert_replicas = in_stage // par.expert_model_parallel_size  # expert tensor parallel size 1
    word = 2 if train.bf16 else 4
    shared = replicas * par.context_parallel_size
    whole = ranks * shared  # the ranks that share the encoder's state
    if not par.use_distributed_optimizer:
        shared = expert_replicas = whole = 1
    moments = 8 + (4 if train.bf16 else 0)
    held += 0 if encoder is None else encoder.elements
    updated = dense // shared + expert // expert_replicas + of_encoder // whole
    state = State(word * held, 4 * (dense + expert + of_encoder), moments * updated)
    rl = reinforced(run)
    rollouts = [plan.rollout for plan in found if plan.rollout is not None]
    summed = {"dp_cp": dense, "expt_dp": expert, "encoder_dp": of_encoder}
    if par.use_distributed_optimizer:
        held_by = {"dp_cp": shared, "expt_dp": expert_replicas, "encoder_dp": whole}
        sent = {Link("reduce_scatter", group): 4 * count for group, count in summed.items()}
        sent |= {
            Link("all_gather", group): word * count // held_by[group]
            for group, count in summed.items()
        }
    else:  # every rank updates all it holds
        sent = {Link("all_reduce", group): 4 * count for group, count in summed.items()}
    return RankPlan(
        (place, ranks),
        tuple("".join(layer.kind for layer in stage.layers) for stage in mine),
        (held, held_experts),
        (dense + expert + of_encoder, expert),
        state,
        tuple(traces),
        [Kernel(moved=size, link=link) for link, size in sent.items()],
        microbatches,
        _groups(run, world_size),
        None if rl is None else rough_rollout(run, rl, rollouts, state.parameters),
        encoder,
    )


def _together(traces: list[ChunkTrace], run: RunConfig) -> ChunkTrace:
    """One stage of several letters: an output is the next one's input, and counts once."""
    samples, full = run.training.micro_batch_size, run.training.recompute_granularity == "full"
    share = run.training.recompute_num_layers if full else 1
    held = sum(trace.held - trace.leaves for trace in traces) // share
    forward = max(trace.forward_peak - trace.held for trace in traces)
    # A repeated block holds what its letters hold, beside the last one's own.
    backward = share * max(trace.backward_peak - trace.held for trace in traces)
    return ChunkTrace(
        traces[0].arrives * samples,
        traces[-1].leaves * samples,
        (held + forward) * samples,
        held * samples,
        (held + backward) * samples,
        _of_samples(sum((trace.forward for trace in traces), Work()), samples),
        _of_samples(sum((trace.backward for trace in traces), Work()), samples),
    )


def _of_samples(work: Work, samples: int) -> Work:
    return replace(work.times(samples), launches=work.launches, waits=work.waits)


def _groups(run: RunConfig, world_size: int) -> dict[str, tuple[int, ...]]:
    """The groups of rank 0: megatron-core's order is tp, cp, dp, pp, and for experts ep first."""
    par = run.parallel
    tp, cp, ep = (
        par.tensor_model_parallel_size,
        par.context_parallel_size,
        par.expert_model_parallel_size,
    )
    stage = world_size // par.pipeline_model_parallel_size
    return {
        "tp": tuple(range(tp)),
        "cp": tuple(range(0, tp * cp, tp)),
        "tp_cp": tuple(range(tp * cp)),
        "ep": tuple(range(ep)),
        "tp_ep": tuple(range(ep)),
        "dp_cp": tuple(range(0, stage, tp)),
        "expt_dp": tuple(range(0, stage, ep)),
        "pp": tuple(range(0, world_size, stage)),
        "owners": tuple(p + c for p in range(0, world_size, stage) for c in range(0, tp * cp, tp)),
        "encoder_dp": tuple(range(0, world_size, tp)),
    }

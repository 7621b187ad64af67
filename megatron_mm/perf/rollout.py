"""Memory of reinforcement learning beside a supervised step: the rollout's caches and draws, the
policy's microbatch, the reference and the teachers in host memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_mm.config import RunConfig, hops, num_layers, route_width
from megatron_mm.config.objectives import declaration
from megatron_mm.data.batch import Microbatch
from megatron_mm.earl.router_term import RouterTargets
from megatron_mm.engine.engine import Engine
from megatron_mm.generation.generate import TOKENS_A_TURN, last_positions, rows_of_a_lane
from megatron_mm.generation.sampling import Sampling, draw
from megatron_mm.model.decode import DecodeCache, Filling
from megatron_mm.model.routing import Routes, whole_routes
from megatron_mm.model.segments import Segments
from megatron_mm.parallel.sequence import held_positions
from megatron_mm.perf.assumed import balanced_routes, their_completions
from megatron_mm.perf.encoder import dealt
from megatron_mm.perf.fake import META
from megatron_mm.perf.recorder import Recorder
from megatron_mm.perf.standins import fused_kernels
from megatron_mm.rl.objective import ExpertAlignedObjective, PolicyObjective
from megatron_mm.rl.policy_batch import PolicyBatch
from megatron_mm.rl.policy_losses import loss_denominator
from megatron_mm.rl.reference_settings import ReferenceConfig
from megatron_mm.rl.settings import ResolvedRL, RLConfig, resolved, teacher_folders


def reinforced(run: RunConfig) -> ResolvedRL | None:
    """The settings of reinforcement learning, complete; None for another objective."""
    if RLConfig not in declaration(run).sections.values():
        return None
    return resolved(run)


def policy_objective(rl: ResolvedRL) -> PolicyObjective:
    """The objective as `Experience` makes it."""
    return ExpertAlignedObjective(rl) if rl.earl.router_loss_coeff else PolicyObjective(rl)


def policy_batch(run: RunConfig, rl: ResolvedRL, batch: Microbatch) -> PolicyBatch:
    """`batch`, whose supervised tokens were sampled, with all that the objective may need."""
    sampled = batch.loss_mask_T > 0
    layers = num_layers(run.model.hybrid_layer_pattern)
    zeros_T, language = torch.zeros(len(sampled)), run.model.language
    replayed = None
    if rl.routing_replay != "none":
        routes = balanced_routes(len(sampled), route_width(run.model), language.num_experts)
        replayed = dict.fromkeys(hops(run.model), routes)
    router = None
    if rl.earl.router_loss_coeff:
        members = torch.zeros(1, layers, language.num_experts, dtype=torch.bool)
        router = RouterTargets(zeros_T, members, 1.0, rl.earl.router_temperature)
    completions = their_completions(run, batch)
    return PolicyBatch(
        **vars(batch)
        | {
            "routes": replayed,
            "skill_T": torch.where(sampled, 0, -1),
            "position_weight_T": zeros_T,
        },
        **completions,
        divisor=loss_denominator(
            rl.loss_agg_mode, completions["lengths_N"], rl.max_completion_length
        ),
        advantages_T=zeros_T,
        rollout_logprobs_T=zeros_T,
        old_logprobs_T=zeros_T,
        ref_logprobs_T=zeros_T if rl.ref_load else None,
        rollout_weights_T=zeros_T if rl.rollout_is else None,
        kl_weights_T=zeros_T if rl.beta and rl.advantage_weighting else None,
        learnt_T=sampled if rl.top_entropy_quantile < 1 else None,
        router=router,
    )


@dataclass(frozen=True)
class RolloutTrace:
    """Memory of a rollout on one rank, in bytes, beside parameters, gradients and optimizer state.

    Attributes:
        rows: completions that the replica generates at a time: max_num_seqs, rounded up.
        lanes: into which they are divided, one for each pipeline rank.
        multiple, least: `rows` is a multiple, and has room for a group in every lane.
        cache: of all rows, each as long as a sample may be: keys, values, states of the delta
            rule, inputs of the convolutions, the looks' keys and values, recorded routes.
        prefill: the most that a prefill of a microbatch of prompts holds beside the caches.
        drawing: logits of all rows, and what drawing from those of a lane takes.
        host: in host memory: the weights of the reference and of every teacher, and this model's
            while those are in place.
    """

    rows: int
    lanes: int
    multiple: int
    least: int
    cache: int
    prefill: int
    drawing: int
    host: int

    @property
    def peak(self) -> int:
        return self.cache + max(self.prefill, self.drawing)

    def most_rows(self, room: float) -> float:
        """The most rows that there can be whose rollout fits into `room` bytes; 0 if none fit,
        infinity where a stage holds nothing of them. Caches and drawing grow with the rows, a
        prefill does not."""
        limits = (room, self.cache + self.drawing), (room - self.prefill, self.cache)
        found = [free * self.rows / held for free, held in limits if held]
        if not found:
            return math.inf if room >= self.prefill else 0
        most = min(found) // self.multiple * self.multiple
        return int(most) if most >= self.least else 0


def held_weights(run: RunConfig, rl: ResolvedRL, weights: int) -> int:
    """Bytes of host memory that the sets of weights of a rank take (`rl/reference.py`).

    Args:
        weights: bytes of its parameters.
    """
    sets = len({*teacher_folders(rl).values()}) + (reference_width(run) if rl.ref_load else 0)
    return (sets + 1) * weights if sets else 0


def reference_width(run: RunConfig) -> int:
    """How many times the bytes of the policy's weights those of the reference take."""
    reference = run.section(ReferenceConfig)
    averages = reference.sync_ref_model and reference.ref_model_mixup_alpha < 1
    return 2 if averages and run.training.bf16 else 1  # an average is in fp32


def trace_rollout(
    engine: Engine, recorder: Recorder, batch: Microbatch, records: bool
) -> RolloutTrace:
    """Prefills the rows of a lane on a fake rank and draws for them, as `generate` does.

    Args:
        batch: samples as long as a prompt and its completion may be together, `micro_batch_size`
            of them; `balance` was called for it.
        records: whether the rollout records routes.
    """
    run, pg = engine.run, engine.groups.pg
    rl, lanes = resolved(run), pg.pp.size()
    rows, multiple = rows_of_a_lane(run, rl.num_generations, rl.max_num_seqs)
    filled = min(rows, run.training.micro_batch_size * rl.num_generations)
    prompts = torch.arange(filled) // rl.num_generations
    cache = DecodeCache(rows, Filling(torch.arange(filled), prompts))
    cache.reserve(run.data.seq_length + TOKENS_A_TURN)
    engine.training(False)
    begin = recorder.live
    with torch.no_grad(), fused_kernels(recorder.add), recorder:
        _prefill(engine, cache, batch, records)
        held = recorder.rebase() - begin
        # Again, beside the tensors of all rows, which the first one made.
        _prefill(engine, cache, batch, records)
        prefill = recorder.peak - begin - held
        drawing = 0
        if engine.chunks[-1].post_process:
            drawing = _draw(engine, recorder, rl, rows)
    engine.training(True)
    weights = sum(p.nbytes for module in engine.modules for p in module.parameters())
    return RolloutTrace(
        rows * lanes,
        lanes,
        multiple * lanes,
        lanes * rows_of_a_lane(run, rl.num_generations, 1)[0],
        held * lanes,
        prefill,
        drawing,
        held_weights(run, rl, weights),
    )


def rough_rollout(
    run: RunConfig, rl: ResolvedRL, pieces: Sequence[RolloutTrace], weights: int
) -> RolloutTrace:
    """The rollout of a stage, or of several, put together from rollouts of its sub-layers.

    Args:
        run: a layout; its number of lanes and of rows need not be that of the pieces.
        pieces: traced with one sample in a microbatch; every one keeps as much for a row.
        weights: bytes of the rank's parameters.
    """
    lanes, group = run.parallel.pipeline_model_parallel_size, rl.num_generations
    lane, multiple = rows_of_a_lane(run, group, rl.max_num_seqs)
    rows = lane * lanes
    # The logits of all rows, and what drawing from those of one lane takes.
    logits = 4 * run.model.language.vocab_size
    drawing = 0
    for piece in pieces:
        if piece.drawing:
            of_a_lane = (piece.drawing - logits * piece.rows) * piece.lanes // piece.rows
            drawing += logits * rows + of_a_lane * lane
    return RolloutTrace(
        rows,
        lanes,
        multiple * lanes,
        lanes * rows_of_a_lane(run, group, 1)[0],
        sum(piece.cache * rows // piece.rows for piece in pieces),
        run.training.micro_batch_size * max(piece.prefill for piece in pieces),
        drawing,
        held_weights(run, rl, weights),
    )


def _prefill(engine: Engine, cache: DecodeCache, batch: Microbatch, records: bool) -> None:
    pg, config = engine.groups.pg, engine.config
    routes: Routes | None = {} if records else None
    tokens, there, images = len(batch.tokens_T), batch.to(META), {}
    if engine.encoder is not None:  # the prompts of all lanes together
        lanes = dealt(batch, pg.pp.size(), engine.encoder.owners)
        images = {"encoded": engine.encoder.encode(lanes, train=False)[0]}
    for chunk in engine.chunks:
        if chunk.arrives is not None:
            shape = chunk.wire_rows(batch, chunk.arrives, cache), 1, config.hidden_size
            chunk.set_input_tensor(torch.empty(shape, dtype=config.pipeline_dtype, device=META))
        held = held_positions(last_positions(batch), tokens, pg.cp)
        own = images if chunk.pre_process else {}
        chunk(there, held, cache=cache, routes=routes, **own)
        chunk.received = None
    whole = whole_routes(routes, pg) if routes else {}
    if whole:
        stacked = torch.stack([whole[index] for index in sorted(whole)], 1)
        segments = Segments.from_cu_seqlens(batch.cu_seqlens, stacked.device)
        cache.routes.put("experts", stacked, segments)


def _draw(engine: Engine, recorder: Recorder, rl: ResolvedRL, rows: int) -> int:
    """The most bytes while a token is drawn for every row of every lane."""
    sampling = Sampling((), 1, rl.temperature, rl.top_p, rl.top_k)
    begin = recorder.rebase()
    shape = rows, engine.run.model.language.vocab_size
    logits = [torch.empty(shape, device=META) for _ in range(engine.groups.pg.pp.size())]
    chosen = logits[0].index_select(0, torch.empty(rows, dtype=torch.int64, device=META))
    draw(chosen, sampling, torch.zeros(rows, dtype=torch.float64))
    return recorder.peak - begin

"""Log-probabilities of sampled tokens before the first update, by forward passes.

Shapes: T stream, K positions that a rank computes, C log-probabilities and entropies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_mm.checkpoint.weight_sets import WeightSets
from megatron_mm.engine.engine import Engine
from megatron_mm.generation.lanes import Completion
from megatron_mm.model.layers.output import Predictions
from megatron_mm.model.routing import Routes, whole_routes
from megatron_mm.rl.completion_batch import CompletionBatch
from megatron_mm.rl.reference import REFERENCE, teacher_set
from megatron_mm.rl.settings import ResolvedRL, teacher_folders


@dataclass(frozen=True)
class Logprobs:
    """The log-probabilities of a microbatch's sampled tokens before the first update; fp32 [T]
    each, 0 where no token was sampled.

    Attributes:
        rollout_T: under the model that drew them, as it computed them while it drew.
        old_T: under the same weights, as the trainer computes them. None: they are those of the
            training pass itself.
        ref_T: under the reference model, if there is one.
        routes: the experts of the pass that gave `old_T`, where they are replayed (R2).
        teacher_T: under the teacher of the microbatch, if there is one.
        entropy_T: of the distributions that the tokens were drawn from, in nats, as the trainer
            computes them; where settings ask for it.
    """

    rollout_T: torch.Tensor
    old_T: torch.Tensor | None
    ref_T: torch.Tensor | None
    routes: Routes | None
    teacher_T: torch.Tensor | None = None
    entropy_T: torch.Tensor | None = None


def measure_logprobs(
    engine: Engine,
    batches: Sequence[CompletionBatch],
    completions: Sequence[Completion],
    rl: ResolvedRL,
    *,
    steps: int,
    sets: WeightSets,
) -> list[Logprobs]:
    """Runs the forward passes that the settings need. Every rank of the job calls it. Each set of
    weights is put in place once.

    Args:
        batches: of all steps of a rollout; completions: of this replica.
        steps: optimizer steps that the rollout serves.
        sets: the reference model, if there is one, and the teachers of the microbatches.
    """
    old: list = [None] * len(batches)
    routes: list = [None] * len(batches)
    entropies: list = [None] * len(batches)
    replays, ranks_tokens = rl.routing_replay == "R2", rl.top_entropy_quantile < 1
    # A single step on these weights computes them itself: old and new are the same.
    needs_old = steps > 1 or rl.rollout_is or rl.use_kl_in_reward or rl.teacher_load or replays
    if needs_old or ranks_tokens:
        record: list[Routes] | None = [{} for _ in batches] if replays else None
        held = entropies if ranks_tokens else None
        found = trainer_logprobs(engine, batches, rl.temperature, record, held)
        old = found if needs_old else old
        if record is not None:
            whole = [whole_routes(one, engine.groups.pg) for one in record]
            routes = [{layer: taken.cpu() for layer, taken in one.items()} for one in whole]
    ref, taught = _by_others(engine, batches, rl, sets)
    rollout = [
        batch.spread([completions[n].logprobs_G for n in batch.members]) for batch in batches
    ]
    kinds = (rollout, old, ref, routes, taught, entropies)
    return [Logprobs(*values) for values in zip(*kinds, strict=True)]


def _by_others(
    engine: Engine, batches: Sequence[CompletionBatch], rl: ResolvedRL, sets: WeightSets
) -> tuple[list, list]:
    """Returns what the reference says of each microbatch, and its teacher; None where there is
    none. They choose their own experts, even where the policy replays routes. Drawn experts the
    reference is given: equal weights must not differ by the draw."""
    ref: list = [None] * len(batches)
    taught: list = [None] * len(batches)
    if REFERENCE not in sets and not rl.teacher_load:
        return ref, taught
    free = [replace(batch, routes=None) for batch in batches]
    with sets.swapping() as put:
        if REFERENCE in sets:
            put(REFERENCE)
            drawn = rl.earl.router_temperature > 0
            ref = trainer_logprobs(engine, batches if drawn else free, rl.temperature)
        for name in teacher_folders(rl):
            places = [n for n, batch in enumerate(batches) if batch.teacher == name]
            if not places:  # on every rank
                continue
            put(teacher_set(name))
            found = trainer_logprobs(engine, [free[n] for n in places], rl.temperature)
            for n, known_T in zip(places, found, strict=True):
                taught[n] = known_T
    return ref, taught


def trainer_logprobs(
    engine: Engine,
    batches: Sequence[CompletionBatch],
    temperature: float,
    routes: list[Routes] | None = None,
    entropies: list[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Returns fp32 [T] of each microbatch, on the CPU of every rank of the replica: the
    log-probabilities of sampled tokens at their positions, 0 elsewhere. Every rank of the job calls
    it.

    Args:
        routes: filled as by `Engine.forward`.
        entropies: one for each microbatch, to be replaced by the entropies of the distributions at
            the same positions, in nats.
    """
    groups, kinds = engine.groups, 1 if entropies is None else 2

    def finish(
        predictions: Predictions, batch: CompletionBatch, positions: torch.Tensor
    ) -> torch.Tensor:
        rows = positions.to(predictions.device)
        labels_K = batch.labels_T[rows]
        if entropies is None:
            found = [predictions.logprobs(labels_K, temperature)]
        else:
            found = [*predictions.logprobs_and_entropy(labels_K, temperature)]
        here_K = batch.completion_T[rows] >= 0
        whole_CT = torch.zeros(kinds, len(batch.tokens_T))
        whole_CT[:, positions] = torch.where(here_K, torch.stack(found), 0.0).cpu()
        return whole_CT

    found = engine.forward(batches, lambda batch: batch.sampled, finish, routes=routes)
    lengths = [len(batch.tokens_T) for batch in batches]
    total = torch.zeros(kinds, sum(lengths))
    # Context-parallel ranks hold different positions, tensor-parallel ones the same.
    if groups.is_last_stage and groups.pg.tp.rank() == 0:
        total = torch.cat(found, 1)
    dist.all_reduce(total, group=groups.replica)
    if entropies is not None:
        entropies[:] = total[1].split(lengths)
    return list(total[0].split(lengths))

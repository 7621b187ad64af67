"""Microbatches of completions: prompts with what was sampled, laid end to end.

Values of a sampled token stand at the position whose logits it was drawn from: those of a
completion reach from the last prompt token to its second-to-last token. Slots behind a query are
not sampled (data/looks.py).

Shapes: T stream, N completions of a microbatch, G tokens of one, L layers of this rank, k experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_mm.config import route_width, token_multiple
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.collate import collate
from megatron_mm.data.looks import LookTokens
from megatron_mm.data.sample import Sample, Size
from megatron_mm.data.tiles import ImageSettings, image_settings
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import broadcast_batches
from megatron_mm.generation.answers import answered
from megatron_mm.generation.lanes import Completion
from megatron_mm.model.routing import Routes
from megatron_mm.rl.rollout.draw import Group, moe_layers
from megatron_mm.rl.settings import RLConfig, teacher_folders
from megatron_mm.rl.teachers import teacher_of


@dataclass(kw_only=True)
class CompletionBatch(Microbatch):
    """A microbatch of completions, for forward passes before training.

    Attributes:
        members: which of the replica's completions these are.
        completion_T: int64, the number within the microbatch of the completion whose token was
            sampled from here; -1: none.
        lengths_N: int64, sampled tokens of each.
        teacher: the name of the teacher of all of them, if there is one.
    """

    members: list[int]
    completion_T: torch.Tensor
    lengths_N: torch.Tensor
    teacher: str | None = None

    @property
    def sampled(self) -> torch.Tensor:
        """The positions from which tokens were sampled; int64, ascending."""
        return self.supervised

    def spread(
        self,
        values: Sequence[torch.Tensor],
        fill: float = 0,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Returns [T]: the values of each member's tokens, [G] each, at their positions, and
        `fill` elsewhere."""
        whole_T = torch.full((len(self.tokens_T),), fill, dtype=dtype)
        if values:
            whole_T[self.sampled] = torch.cat([*values]).to(dtype)
        return whole_T

    def position_weights(self, counts_N: torch.Tensor) -> torch.Tensor:
        """Returns `position_weight_T` where completions count `counts_N` in the loss's divisor."""
        segments = self.cu_seqlens.diff()  # the padding is one, and counts nothing
        weight_S = torch.zeros(len(segments))
        weight_S[: len(counts_N)] = counts_N / self.lengths_N.clamp(min=1)
        return weight_S.repeat_interleave(segments)

    def split(self, values_T: torch.Tensor) -> list[torch.Tensor]:
        """Returns [G] of each member: the opposite of `spread`."""
        return list(values_T[self.sampled].split(self.lengths_N.tolist()))


def completion_batch(
    samples: Sequence[Sample],
    members: Sequence[int],
    *,
    settings: ImageSettings | None,
    pad_id: int,
    pad_multiple: int,
) -> CompletionBatch:
    """Joins `answered` samples; none gives a microbatch of padding."""
    batch = collate(samples, settings=settings, pad_id=pad_id, pad_multiple=pad_multiple)
    lengths_N = torch.tensor([int(s.loss_mask_T.sum()) for s in samples], dtype=torch.int64)
    completion_T = torch.full_like(batch.tokens_T, -1)
    sampled = batch.supervised
    completion_T[sampled] = torch.arange(len(samples)).repeat_interleave(lengths_N)
    return CompletionBatch(
        **vars(batch), members=[*members], completion_T=completion_T, lengths_N=lengths_N
    )


def per_completion(
    batches: Sequence[CompletionBatch], values: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Returns [G] of each of the replica's completions, in their order.

    Args:
        values: [T] of each microbatch.
    """
    found: dict[int, torch.Tensor] = {}
    for batch, values_T in zip(batches, values, strict=True):
        found |= dict(zip(batch.members, batch.split(values_T), strict=True))
    return [found[n] for n in range(len(found))]


def token_bins(
    sizes: Sequence[Size],
    capacity: int,
    most_tiles: int | None = None,
    images_of: Sequence[int] | None = None,
) -> list[list[int]]:
    """Returns the indices of samples in bins of at most `capacity` tokens and `most_tiles`. Each
    goes into the first bin with room, so that neighbours (completions of one prompt, whose images
    are then computed once) stay together. A sample beyond that has a bin to itself.

    Args:
        most_tiles: None: only the tokens count.
        images_of: samples with the same number have the same images, whose tiles count once in a
            bin; None: each has its own.
    """
    bins: list[list[int]] = []
    free: list[tuple[float, float]] = []  # tokens and tiles
    seen: list[set[int]] = []
    for index, size in enumerate(sizes):
        owner = index if images_of is None else images_of[index]
        added = [0 if owner in known else size.tiles for known in seen]
        fits = (
            left >= size.tokens and (not more or room >= more)
            for (left, room), more in zip(free, added, strict=True)
        )
        place = next((b for b, fit in enumerate(fits) if fit), len(bins))
        if place == len(bins):
            bins.append([])
            free.append((capacity, math.inf if most_tiles is None else most_tiles))
            seen.append(set())
            added.append(size.tiles)
        bins[place].append(index)
        left, room = free[place]
        free[place] = left - size.tokens, room - added[place]
        seen[place].add(owner)
    return bins


def bins_by_name[Name](
    names: Sequence[Name],
    of: Sequence[Name],
    sizes: Sequence[Size],
    capacity: int,
    most_tiles: int | None = None,
    images_of: Sequence[int] | None = None,
) -> list[list[list[int]]]:
    """Returns for each name the `token_bins` of the samples that are its own.

    Args:
        of: the name of each sample.
    """
    found = []
    for name in names:
        mine = [i for i, its in enumerate(of) if its == name]
        owners = None if images_of is None else [images_of[i] for i in mine]
        inside = token_bins([sizes[i] for i in mine], capacity, most_tiles, owners)
        found.append([[mine[i] for i in places] for places in inside])
    return found


def pack_step(
    engine: Engine, tokenizer: Tokenizer, groups: Sequence[Group], chosen: Sequence[int]
) -> list[CompletionBatch]:
    """Returns the completions of one step in as many microbatches on every replica, and as many of
    each teacher, with the rollout's routes where they are replayed (R3). All completions of a
    microbatch have the same teacher. Every rank of the job calls it.

    Args:
        groups: of this replica, all of the rollout; chosen: the places of those in this step.
    """
    run, rl = engine.run, engine.run.section(RLConfig)
    size = rl.num_generations
    completions = [completion for group in groups for completion in group.completions]
    members = [p * size + g for p in chosen for g in range(size)]
    capacity = run.training.micro_batch_size * run.data.seq_length
    teachers: list[str | None] = [*teacher_folders(rl)] or [None]
    samples: list[Sample] = []
    bins: list[list[list[int]]] = [[] for _ in teachers]
    if engine.groups.is_reader:
        asked = [groups[n // size].asked for n in members]
        looks = LookTokens.of(run, tokenizer)
        samples = [
            answered(prompt.sample, completions[n].tokens_G, looks)
            for prompt, n in zip(asked, members, strict=True)
        ]
        of = [teacher_of(prompt.row, prompt.where, rl) for prompt in asked]
        sizes, prompts = [sample.size for sample in samples], [n // size for n in members]
        bins = bins_by_name(teachers, of, sizes, capacity, run.data.max_pack_tiles, prompts)
    counts = torch.tensor([len(its) for its in bins])
    dist.all_reduce(counts, op=dist.ReduceOp.MAX, group=engine.groups.world)
    stages = engine.groups.pg.pp.size() if len(engine.chunks) > 1 else 1
    total = max(1, int(counts.sum()))
    counts[-1] += -(-total // stages) * stages - counts.sum()  # the interleaved schedule's rounds
    batches: list[CompletionBatch] = []
    if engine.groups.is_reader:
        for teacher, its, count in zip(teachers, bins, counts.tolist(), strict=True):
            for inside in its + [[] for _ in range(count - len(its))]:
                batch = completion_batch(
                    [samples[i] for i in inside],
                    [members[i] for i in inside],
                    settings=image_settings(run),
                    pad_id=tokenizer.pad_id,
                    pad_multiple=token_multiple(run),
                )
                batches.append(replace(batch, teacher=teacher))
    batches = broadcast_batches(engine.groups, batches)
    if rl.routing_replay != "R3":
        return batches
    layers, k = moe_layers(engine), route_width(run.model)
    return [
        replace(batch, routes=recorded_routes(batch, completions, layers, k)) for batch in batches
    ]


def recorded_routes(
    batch: CompletionBatch, completions: Sequence[Completion], layers: Sequence[int], k: int
) -> Routes:
    """Returns the rollout's routes at the positions of a microbatch; -1 where there are none.

    Args:
        layers: moe indices of this rank's layers, ascending.
    """
    whole_TLk = torch.full((len(batch.tokens_T), len(layers), k), -1, dtype=torch.int16)
    for place, member in enumerate(batch.members):
        routes_SLk = completions[member].routes_SLk
        if routes_SLk is not None:
            start = int(batch.cu_seqlens[place])
            whole_TLk[start : start + len(routes_SLk)] = routes_SLk
    return dict(zip(layers, whole_TLk.unbind(1), strict=True))

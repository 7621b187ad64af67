"""Probes a forward pass: attention weights of looks and expert choices.

For evaluation and reports only. Each rank reduces its part of a microbatch to small tables, which
go to the replica's reader.
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist

from megatron_mm.config import memories_of_pairs
from megatron_mm.data.batch import BatchMemory, Microbatch
from megatron_mm.engine.engine import Engine
from megatron_mm.model.routing import Routes
from megatron_mm.model.segments import Segments
from megatron_mm.parallel.sequence import part, shard, take

# pair -> per sample [answer tokens, patches of that sample in the memory that the look reads],
# averaged over heads
Looks = dict[int, list[torch.Tensor]]
# layer number -> [samples, experts]: number of tokens of each sample routed to each expert
Load = dict[int, torch.Tensor]


def probe(
    engine: Engine, batch: Microbatch, prompt_lengths: list[int], answer_lengths: list[int]
) -> tuple[Looks, Load]:
    """Runs a microbatch forward and returns looks and expert loads, on the replica's reader; empty
    on other ranks. Every rank of the job calls it.

    Args:
        batch: prompts with their answers, padded or not, with or without a padding tail.
        prompt_lengths: tokens of each sample before its answer. Attention weights are those of the
            positions that predict the answer's tokens, from the last prompt token on.
        answer_lengths: tokens of each answer without padding, which no load counts.
    """
    samples = len(prompt_lengths)
    sample_of_T = torch.full((len(batch.tokens_T),), samples)  # of padding, dropped later
    begins = batch.cu_seqlens.tolist()
    sizes = zip(begins, prompt_lengths, answer_lengths, strict=False)
    for sample, (begin, before, answer) in enumerate(sizes):
        sample_of_T[begin : begin + before + answer] = sample
    weights: dict[int, list[torch.Tensor]] = {}
    nowhere = torch.zeros(0, dtype=torch.int64)
    chosen: Routes = {}
    engine.forward(
        [batch], lambda batch: nowhere, lambda *_, **__: None, looks=weights, routes=[chosen]
    )
    groups = engine.groups
    mine = take(sample_of_T, shard(len(sample_of_T), groups.pg))
    experts = engine.run.model.language.num_experts
    load = {layer: _count(routes, mine, samples, experts) for layer, routes in chosen.items()}
    stream = Segments.from_cu_seqlens(batch.cu_seqlens)
    local = stream.within(part(stream.total, groups.pg.cp))
    looks: Looks = {}
    reads = memories_of_pairs(engine.run.model)
    for pair, recorded in weights.items():
        patches = _patches(batch.memories[reads[pair].name], batch.cu_seqlens, samples)
        seen = [weights.float().mean(0).cpu() for weights in recorded]
        looks[pair] = [
            _answer_rows(seen, stream, local, sample, prompt_lengths[sample], patches[sample])
            for sample in range(samples)
        ]
    parts: list = [None] * groups.replica.size()
    dist.all_gather_object(parts, (looks, load), group=groups.replica)
    if not groups.is_reader:
        return {}, {}
    return _merge(parts, groups.pg.tp.size())


def _count(
    routes_tk: torch.Tensor, sample_of_t: torch.Tensor, samples: int, experts: int
) -> torch.Tensor:
    """fp32 [samples, experts]: number of each sample's positions on this rank routed to each
    expert, in all hops."""
    table = torch.zeros(samples + 1, experts)
    chosen_tk = routes_tk.long().cpu()
    taken_tk = chosen_tk >= 0
    where = sample_of_t.unsqueeze(1).expand_as(chosen_tk)[taken_tk], chosen_tk[taken_tk]
    return table.index_put_(where, torch.ones(()), accumulate=True)[:samples]


def _patches(memory: BatchMemory, cu_seqlens: torch.Tensor, samples: int) -> list[int]:
    """Counts the patches of a memory that belong to each sample."""
    owner = torch.searchsorted(cu_seqlens[1:], memory.visible_M2[:, 1].contiguous())
    return torch.bincount(owner, minlength=samples)[:samples].tolist()


def _answer_rows(
    seen: list[torch.Tensor],
    stream: Segments,
    local: Segments,
    sample: int,
    prompt: int,
    patches: int,
) -> torch.Tensor:
    """Attention weights of one sample's answer, [answer tokens, patches]; zero at positions of
    other context-parallel ranks.

    Args:
        seen: weights of each sample with positions on this rank, [positions here, patches].
    """
    rows = torch.zeros(int(stream.lengths[sample]) - prompt, patches)
    place = sample - local.first
    if not 0 <= place < local.count:
        return rows
    # Row of the first position held here; the answer's first row is at position prompt - 1.
    begins = int(local.origin + local.starts[place] - stream.starts[sample]) - (prompt - 1)
    first, stop = max(0, begins), min(len(rows), begins + int(local.lengths[place]))
    if first < stop:
        rows[first:stop] = seen[place][first - begins : stop - begins]
    return rows


def _merge(parts: list[tuple[Looks, Load]], tp_size: int) -> tuple[Looks, Load]:
    """Sums the parts of all ranks. Heads are split over tensor-parallel ranks, positions over
    context-parallel ranks, and positions of routes over both."""
    looks: Looks = {}
    load: Load = defaultdict(lambda: torch.zeros(()))
    for some_looks, some_load in parts:
        for pair, per_sample in some_looks.items():
            shares = [weights / tp_size for weights in per_sample]
            known = looks.get(pair, [0.0] * len(shares))
            looks[pair] = [a + b for a, b in zip(known, shares, strict=True)]
        for layer, counts in some_load.items():
            load[layer] = load[layer] + counts
    return looks, dict(load)

"""Run a labelled probe through the model and count which experts its tokens took.

The model reads rows with their own answers. Counted are the positions that predict the tokens of
a labelled span, one before each, with the token that stands there: what the router saw. Routes
stay on the ranks of their layers and positions; only counts are brought together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_mm.config import token_multiple
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.blocks import BlockCache
from megatron_mm.data.chat import check_messages
from megatron_mm.data.collate import collate
from megatron_mm.data.errors import DataError
from megatron_mm.data.rows import open_source
from megatron_mm.data.sample import Sample, SampleBuilder
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.parallel.sequence import shard, take
from megatron_mm.rl.discover import Tally, on_layers
from megatron_mm.rl.errors import RLError
from megatron_mm.rl.route_counts import RouteCounts, count_routes
from megatron_mm.rl.spans import Label, load_labeller, token_labels
from megatron_mm.train.engine import Engine
from megatron_mm.train.feed import agree, receive


@dataclass(frozen=True)
class Probe:
    """What is read: at most `samples` rows of a file (None: all), in an order drawn from `seed`,
    `batch_size` together; spans are found by `labeller` (rl/spans.py)."""

    data: str
    labeller: str = "clauses"
    samples: int | None = None
    batch_size: int = 16
    seed: int = 1


class ProbeRows:
    """The rows of a probe with their labels. Raises DataError or RLError, also on access."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, probe: Probe) -> None:
        self._rows = open_source(probe.data, BlockCache())
        self._builder = SampleBuilder(engine.run, tokenizer)
        self._tokenizer, self._labeller = tokenizer, load_labeller(probe.labeller)
        generator = torch.Generator().manual_seed(probe.seed)
        order = torch.randperm(len(self._rows), generator=generator)
        self.order = order[: probe.samples].tolist()
        if len(self.order) < 2:
            raise DataError(f"{probe.data}: {len(self.order)} rows; two halves need at least 2")
        self.settings = self._builder.settings

    def labels(self, index: int) -> tuple[int, list[Label]]:
        """(tokens of a row's answer with its stop, its labels); reads no image."""
        file, index = self._rows.locate(index)
        row, where = file[index], file.where(index)
        last = check_messages(row, where)[-1]
        if last["role"] != "assistant":
            raise DataError(
                f"{where}: the last of {len(row['messages'])} messages is a {last['role']} turn; "
                "a probe follows the row's own answer, end with an assistant turn"
            )
        ids = self._tokenizer.encode(last["content"])
        labels = token_labels(row, ids, self._tokenizer, self._labeller, where)
        return len(ids) + 1, labels

    def skills(self) -> list[str]:
        """The skills of all rows, sorted: their order is that of their ids."""
        found = {label.skill for index in self.order for label in self.labels(index)[1]}
        if not found:
            raise DataError(
                f"0 of {len(self.order)} rows have labels; rows need 'spans' (labeller clauses) "
                "or 'skill' and 'ground_truth' (labeller whole)"
            )
        return sorted(found)

    def sample(self, index: int, skills: Sequence[str]) -> tuple[Sample, torch.Tensor]:
        """(the row as the model reads it, int64 [tokens] the skill that a position serves or -1)"""
        file, row = self._rows.locate(index)
        sample = self._builder.training(file[row], file.where(row), file.folder)
        answer, labels = self.labels(index)
        skill_T = torch.full_like(sample.tokens_T, -1)
        # A sample ends with its answer; the position before a token predicts it.
        before = len(skill_T) - answer - 1
        for label in labels:
            skill_T[before + label.start : before + label.stop] = skills.index(label.skill)
        return sample, skill_T


def count_probe(
    engine: Engine, tokenizer: Tokenizer, probe: Probe
) -> tuple[list[str], list[RouteCounts] | None, int]:
    """(skills, the counts of two halves of the probe, how many rows); the counts on the job's
    first rank, else None. Every rank of the job calls it.

    Raises:
        DataError: on every rank, if a row is bad or too few of them are labelled.
    """
    groups = engine.groups
    rows, plan, error = None, [None], None
    if groups.is_reader:
        try:
            rows = ProbeRows(engine, tokenizer, probe)
            if dist.get_rank() == 0:
                plan = [(rows.skills(), rows.order)]
        except (DataError, RLError) as problem:
            error = str(problem)
    agree(groups, error)
    dist.broadcast_object_list(plan, src=0, group=groups.world)
    skills, order = plan[0]
    # A microbatch is of one half, and there is one for every stage of every replica in a round.
    size = probe.batch_size
    chunks = [
        (half, order[half::2][i : i + size])
        for half in (0, 1)
        for i in range(0, len(order[half::2]), size)
    ]
    together = groups.pg.dp.size() * groups.pg.pp.size()
    chunks += [(0, [])] * (-len(chunks) % together)
    tallies = Tally(), Tally()
    engine.training(False)
    for start in range(0, len(chunks), together):
        mine = chunks[start : start + together][groups.pg.dp.rank() :: groups.pg.dp.size()]
        batches, labels = _read(engine, tokenizer, rows, mine, order[0], skills)
        for (half, _), counts in zip(mine, _count(engine, batches, labels, skills), strict=True):
            if counts is not None:
                tallies[half].add(counts)
    engine.training(True)
    parts = [None] * groups.world.size() if dist.get_rank() == 0 else None
    dist.gather_object([tally.total() for tally in tallies], parts, dst=0, group=groups.world)
    if parts is None:
        return skills, None, len(order)
    merged = [Tally(waiting=[p[half] for p in parts if p[half] is not None]) for half in (0, 1)]
    return skills, [tally.total() for tally in merged], len(order)


def _read(
    engine: Engine,
    tokenizer: Tokenizer,
    rows: ProbeRows | None,
    chunks: list[tuple[int, list[int]]],
    any_row: int,
    skills: list[str],
) -> tuple[list[Microbatch], list[torch.Tensor]]:
    """The replica's microbatches and the skill of each of their positions."""
    labels: list[torch.Tensor] = []

    def read() -> list[Microbatch]:
        batches = []
        for _, indices in chunks:
            # Nothing to count, but other replicas may need our part of their forward passes.
            made = [rows.sample(index, skills) for index in indices or [any_row]]
            batch = collate(
                [sample for sample, _ in made],
                settings=rows.settings,
                pad_id=tokenizer.pad_id,
                pad_multiple=token_multiple(engine.run),
            )
            skill_T = torch.full_like(batch.tokens_T, -1)
            if indices:
                skill_T[: batch.num_real_tokens] = torch.cat([skill for _, skill in made])
            batches.append(batch)
            labels.append(skill_T)
        return batches

    batches, _ = receive(engine.groups, read)
    message = [labels]
    dist.broadcast_object_list(message, group=engine.groups.replica, group_src=0)
    return batches, message[0]


def _count(
    engine: Engine, batches: list[Microbatch], labels: list[torch.Tensor], skills: list[str]
) -> list[RouteCounts | None]:
    """Of each microbatch: what this rank's layers did at its positions. None without layers."""
    language, layers = engine.run.model.language, engine.config.num_layers
    sizes = language.num_experts, len(skills), language.vocab_size
    records: list[dict] = [{} for _ in batches]
    nowhere = torch.zeros(0, dtype=torch.int64)
    engine.forward(batches, lambda batch: nowhere, lambda logits, **_: None, routes=records)
    counts: list[RouteCounts | None] = []
    for batch, skill_T, record in zip(batches, labels, records, strict=True):
        if not record:
            counts.append(None)
            continue
        mine, here = shard(len(skill_T), engine.groups.pg), sorted(record)
        routes_tLk = torch.stack([record[index] for index in here], 1).cpu()
        found = count_routes(routes_tLk, take(skill_T, mine), take(batch.tokens_T, mine), *sizes)
        counts.append(on_layers(found, here, layers))
    return counts

"""Runs a labelled probe through the model and counts the experts that its tokens took.

The model reads rows with their own answers. A position is counted if it predicts a token of a
labelled span, which is one position later. The token counted with it is the one that stands at the
position, since that is what the router saw. Routes stay on the ranks of their layers and positions;
ranks exchange only counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_mm.config import token_multiple
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.collate import collate
from megatron_mm.data.files.rows import open_row_files
from megatron_mm.data.loading.shuffle import RowGroupCache
from megatron_mm.data.sample import Sample, SampleBuilder
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.earl.make_map import Tally, on_layers
from megatron_mm.earl.route_counts import RouteCounts, count_routes
from megatron_mm.earl.spans import Label, answer_labels, load_labeller
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import from_reader, raise_together, receive
from megatron_mm.errors import DataError, RLError
from megatron_mm.parallel.sequence import shard, take


@dataclass(frozen=True)
class Probe:
    """The settings of a probe.

    Attributes:
        data: a file of rows with their answers.
        labeller: finds the labelled spans of an answer (earl/spans.py).
        samples: how many rows are read, in an order drawn from `seed`; None: all.
        batch_size: rows of a microbatch.
        shuffles: how often the same is counted with the skills exchanged among rows, which shows
            what chance alone gives. If the map beats all of 19, the odds of chance are 1 in 20.
    """

    data: str
    labeller: str = "clauses"
    samples: int | None = None
    batch_size: int = 16
    seed: int = 1
    shuffles: int = 19


@dataclass(frozen=True)
class ProbePlan:
    """The rows that are counted, with their labels.

    Attributes:
        rows: in reading order: row -> (tokens of its answer with the stop, its spans). A span is
            (first token, end, skill ids): its own skill, then that of each shuffle.
    """

    skills: list[str]
    rows: dict[int, tuple[int, list[tuple[int, int, list[int]]]]]
    shuffles: int


class ProbeRows:
    """The rows of a probe with their labels.

    Raises:
        DataError, RLError: at construction and on access, for a file or row that cannot be used.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, probe: Probe) -> None:
        self._rows = open_row_files(probe.data, RowGroupCache())
        self._builder = SampleBuilder(engine.run, tokenizer)
        self._tokenizer, self._labeller = tokenizer, load_labeller(probe.labeller)
        generator = torch.Generator().manual_seed(probe.seed)
        order = torch.randperm(len(self._rows), generator=generator)
        self.order = order[: probe.samples].tolist()
        if len(self.order) < 2:
            raise DataError(f"{probe.data}: {len(self.order)} rows; two halves need at least 2")
        self.settings = self._builder.settings

    def labels(self, index: int) -> tuple[int, list[Label]]:
        """Returns the number of tokens of a row's answer with its stop, and its labels; reads no
        image."""
        file, index = self._rows.locate(index)
        return answer_labels(file[index], self._tokenizer, self._labeller, file.where(index))

    def plan(self, probe: Probe) -> ProbePlan:
        """Plans what is counted. Skills are shuffled among rows and not among spans: the spans of a
        row share its skills and its routes, and must keep both."""
        found = [self.labels(index) for index in self.order]
        skills = sorted({label.skill for _, labels in found for label in labels})
        if not skills:
            raise DataError(
                f"0 of {len(self.order)} rows have labels; rows need 'spans' (labeller clauses) "
                "or 'skill' and 'ground_truth' (labeller whole)"
            )
        own = [[skills.index(label.skill) for label in labels] for _, labels in found]
        generator = torch.Generator().manual_seed(probe.seed)
        labelled = [number for number, ids in enumerate(own) if ids]
        donors = []
        for _ in range(probe.shuffles):
            places = torch.randperm(len(labelled), generator=generator).tolist()
            donors.append(dict(zip(labelled, (own[labelled[i]] for i in places), strict=True)))
        rows = {}
        for number, (answer, labels) in enumerate(found):
            spans = [
                (label.start, label.stop, [own[number][i], *(_nth(d[number], i) for d in donors)])
                for i, label in enumerate(labels)
            ]
            rows[self.order[number]] = answer, spans
        return ProbePlan(skills, rows, probe.shuffles)

    def sample(self, index: int, plan: ProbePlan) -> tuple[Sample, torch.Tensor]:
        """Returns the row as the model reads it, and the skill that each position serves or -1,
        int16 [labellings, tokens]."""
        file, row = self._rows.locate(index)
        sample = self._builder.training(file[row], file.where(row), file.folder)
        answer, spans = plan.rows[index]
        skill_JT = torch.full((1 + plan.shuffles, len(sample.tokens_T)), -1, dtype=torch.int16)
        # A sample ends with its answer; the position before a token predicts it.
        before = len(sample.tokens_T) - answer - 1
        for start, stop, ids in spans:
            skill_JT[:, before + start : before + stop] = torch.tensor(ids).unsqueeze(1)
        return sample, skill_JT


def _nth(ids: list[int], i: int) -> int:
    return ids[i % len(ids)]


@dataclass(frozen=True)
class ProbeCounts:
    """The route counts of a probe; the counts on rank 0 only, elsewhere the lists are empty.

    Attributes:
        halves: of every other row, and of the rest.
        shuffled: of all rows, with the skills shuffled among rows; one for each shuffle.
    """

    skills: list[str]
    samples: int
    halves: list[RouteCounts]
    shuffled: list[RouteCounts]


def count_probe(engine: Engine, tokenizer: Tokenizer, probe: Probe) -> ProbeCounts:
    """Reads and counts a probe. Every rank of the job calls it.

    Raises:
        DataError: on every rank, if a row is bad or none is labelled.
    """
    groups = engine.groups
    rows, error = None, None
    planned: list[ProbePlan | None] = [None]
    if groups.is_reader:
        try:
            rows = ProbeRows(engine, tokenizer, probe)
            if dist.get_rank() == 0:
                planned = [rows.plan(probe)]
        except (DataError, RLError) as problem:
            error = str(problem)
    raise_together(groups, error)
    dist.broadcast_object_list(planned, src=0, group=groups.world)
    (plan,) = planned
    assert plan is not None  # rank 0 is a reader, and had no error
    # All rows of a microbatch are of one half. A round has one microbatch for each stage of each
    # replica.
    size, order = probe.batch_size, list(plan.rows)
    chunks = [
        (half, order[half::2][i : i + size])
        for half in (0, 1)
        for i in range(0, len(order[half::2]), size)
    ]
    together = groups.pg.dp.size() * groups.pg.pp.size()
    chunks += [(0, [])] * (-len(chunks) % together)
    tallies = [Tally() for _ in range(2 + plan.shuffles)]
    engine.training(False)
    for start in range(0, len(chunks), together):
        mine = chunks[start : start + together][groups.pg.dp.rank() :: groups.pg.dp.size()]
        batches, labels = _read(engine, tokenizer, rows, mine, plan)
        for (half, _), counts in zip(mine, _count(engine, batches, labels, plan), strict=True):
            for tally, found in zip([tallies[half], *tallies[2:]], counts, strict=False):
                tally.add(found)
    engine.training(True)
    parts: list | None = [None] * groups.world.size() if dist.get_rank() == 0 else None
    dist.gather_object([tally.total() for tally in tallies], parts, dst=0, group=groups.world)
    if parts is None:
        return ProbeCounts(plan.skills, len(order), [], [])
    totals: list[RouteCounts] = []
    for of_tally in zip(*parts, strict=True):
        merged = Tally(waiting=[c for c in of_tally if c is not None]).total()
        assert merged is not None  # every tally has counted rows
        totals.append(merged)
    return ProbeCounts(plan.skills, len(order), totals[:2], totals[2:])


def _read(
    engine: Engine,
    tokenizer: Tokenizer,
    rows: ProbeRows | None,
    chunks: list[tuple[int, list[int]]],
    plan: ProbePlan,
) -> tuple[list[Microbatch], list[torch.Tensor]]:
    """Returns the replica's microbatches and the skills of their positions, [labellings, T]
    each."""
    labels: list[torch.Tensor] = []
    any_row = next(iter(plan.rows))

    def read() -> list[Microbatch]:
        assert rows is not None  # `receive` calls it on readers
        batches = []
        for _, indices in chunks:
            # Without rows nothing is counted, but other replicas may need this forward pass.
            made = [rows.sample(index, plan) for index in indices or [any_row]]
            batch = collate(
                [sample for sample, _ in made],
                settings=rows.settings,
                pad_id=tokenizer.pad_id,
                pad_multiple=token_multiple(engine.run),
            )
            skill_JT = torch.full((1 + plan.shuffles, len(batch.tokens_T)), -1, dtype=torch.int16)
            if indices:
                skill_JT[:, : batch.num_real_tokens] = torch.cat([skill for _, skill in made], 1)
            batches.append(batch)
            labels.append(skill_JT)
        return batches

    batches, _ = receive(engine.groups, read)
    return batches, from_reader(engine.groups, labels)


def _count(
    engine: Engine, batches: list[Microbatch], labels: list[torch.Tensor], plan: ProbePlan
) -> list[list[RouteCounts]]:
    """Counts the routes of this rank's layers at its positions: for each microbatch one count for
    each labelling, none on a rank without layers."""
    language, layers = engine.run.model.language, engine.config.num_layers
    sizes = language.num_experts, len(plan.skills), language.vocab_size
    records: list[dict] = [{} for _ in batches]
    nowhere = torch.zeros(0, dtype=torch.int64)
    engine.forward(batches, lambda batch: nowhere, lambda *_, **__: None, routes=records)
    counts: list[list[RouteCounts]] = []
    for batch, skill_JT, record in zip(batches, labels, records, strict=True):
        here, mine = sorted(record), shard(len(batch.tokens_T), engine.groups.pg)
        counts.append([])
        if here:
            routes_tLk = torch.stack([record[index] for index in here], 1).cpu()
            token_t = take(batch.tokens_T, mine)
            for skill_T in skill_JT.long():
                found = count_routes(routes_tLk, take(skill_T, mine), token_t, *sizes)
                counts[-1].append(on_layers(found, here, layers))
    return counts

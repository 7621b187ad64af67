"""The rows of a labelled probe, as microbatches with the skill of each position.

The model reads rows with their own answers. A position has the skill of the token that it predicts,
which is one position later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_mm.config import token_multiple
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.collate import collate
from megatron_mm.data.files.rows import open_row_files
from megatron_mm.data.loading.shuffle import RowGroupCache
from megatron_mm.data.sample import Sample, SampleBuilder
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.earl.spans import Label, answer_labels, load_labeller
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import from_reader, raise_together, receive
from megatron_mm.errors import DataError, RLError


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


class ProbeSpan(NamedTuple):
    """A labelled span: tokens [start, stop) of an answer, its skill's id and then that of each
    shuffle, and whether it is right."""

    start: int
    stop: int
    skills: list[int]
    right: bool


@dataclass(frozen=True)
class ProbePlan:
    """The rows that are read, with their labels.

    Attributes:
        rows: in reading order: row -> (tokens of its answer with the stop, its spans).
    """

    skills: list[str]
    rows: dict[int, tuple[int, list[ProbeSpan]]]
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
        """Plans what is read. Skills are shuffled among rows and not among spans: the spans of a
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
                ProbeSpan(
                    label.start,
                    label.stop,
                    [own[number][i], *(_nth(d[number], i) for d in donors)],
                    label.correct,
                )
                for i, label in enumerate(labels)
            ]
            rows[self.order[number]] = answer, spans
        return ProbePlan(skills, rows, probe.shuffles)

    def sample(self, index: int, plan: ProbePlan) -> tuple[Sample, torch.Tensor, torch.Tensor]:
        """Returns the row as the model reads it, the skill that each position serves or -1, int16
        [labellings, tokens], and whether its span is right, bool [tokens]."""
        file, row = self._rows.locate(index)
        sample = self._builder.training(file[row], file.where(row), file.folder)
        answer, spans = plan.rows[index]
        skill_JT = torch.full((1 + plan.shuffles, len(sample.tokens_T)), -1, dtype=torch.int16)
        at_A = sample.predicting(answer)  # a sample ends with its answer
        right_T = torch.zeros(len(sample.tokens_T), dtype=torch.bool)
        for start, stop, ids, right in spans:
            here = at_A[start:stop]
            skill_JT[:, here] = torch.tensor(ids, dtype=torch.int16).unsqueeze(1)
            right_T[here] = right
        return sample, skill_JT, right_T


def _nth(ids: list[int], i: int) -> int:
    return ids[i % len(ids)]


class ProbeBatch(NamedTuple):
    """A microbatch of a probe.

    Attributes:
        half: which half of the rows it is of, 0 or 1.
        skill_JT: int16 [labellings, T]: the skill of each position or -1; the rows' own labels
            first, then one labelling for each shuffle.
        right_T: bool, whether the position's span is right.
        real: positions before the padding; 0 for a microbatch that only keeps other replicas
            company, whose positions have no skill.
    """

    half: int
    batch: Microbatch
    skill_JT: torch.Tensor
    right_T: torch.Tensor
    real: int


@dataclass(frozen=True)
class OpenProbe:
    """A probe that is ready to be read in rounds, each of one microbatch for every pipeline stage
    of every replica.

    Attributes:
        rows: on readers only.
        chunks: (half, rows of a microbatch), in reading order; whole rounds.
        together: microbatches of a round.
    """

    rows: ProbeRows | None
    plan: ProbePlan
    chunks: list[tuple[int, list[int]]]
    together: int

    @property
    def rounds(self) -> int:
        return len(self.chunks) // self.together


def open_probe(engine: Engine, tokenizer: Tokenizer, probe: Probe) -> OpenProbe:
    """Opens a probe and plans its rounds. Every rank of the job calls it.

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
    size, order = probe.batch_size, list(plan.rows)
    chunks = [
        (half, order[half::2][i : i + size])
        for half in (0, 1)
        for i in range(0, len(order[half::2]), size)
    ]
    together = groups.pg.dp.size() * groups.pg.pp.size()
    chunks += [(0, [])] * (-len(chunks) % together)
    return OpenProbe(rows, plan, chunks, together)


def read_round(
    engine: Engine, tokenizer: Tokenizer, opened: OpenProbe, number: int
) -> list[ProbeBatch]:
    """Returns the replica's microbatches of a round. Every rank of the job calls it.

    Raises:
        DataError: on every rank, if a row is bad.
    """
    plan, dp = opened.plan, engine.groups.pg.dp
    chunks = opened.chunks[number * opened.together : (number + 1) * opened.together]
    chunks = chunks[dp.rank() :: dp.size()]
    labels: list[tuple[torch.Tensor, torch.Tensor, int]] = []
    any_row = next(iter(plan.rows))

    def read() -> list[Microbatch]:
        assert opened.rows is not None  # `receive` calls it on readers
        batches = []
        for _, indices in chunks:
            # Without rows nothing is counted, but other replicas may need this forward pass.
            made = [opened.rows.sample(index, plan) for index in indices or [any_row]]
            batch = collate(
                [sample for sample, _, _ in made],
                settings=opened.rows.settings,
                pad_id=tokenizer.pad_id,
                pad_multiple=token_multiple(engine.run),
            )
            length, real = len(batch.tokens_T), batch.num_real_tokens if indices else 0
            skill_JT = torch.full((1 + plan.shuffles, length), -1, dtype=torch.int16)
            right_T = torch.zeros(length, dtype=torch.bool)
            if indices:
                skill_JT[:, :real] = torch.cat([skill for _, skill, _ in made], 1)
                right_T[:real] = torch.cat([right for _, _, right in made])
            batches.append(batch)
            labels.append((skill_JT, right_T, real))
        return batches

    batches, _ = receive(engine.groups, read)
    return [
        ProbeBatch(half, batch, *of_batch)
        for (half, _), batch, of_batch in zip(
            chunks, batches, from_reader(engine.groups, labels), strict=True
        )
    ]

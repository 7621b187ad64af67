"""EARL in a run: which tokens exercise which skill, and how often they met its experts.

Routes stay on the ranks of their layers; ranks exchange only the sums of each completion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_mm.config import RunConfig, effective_pattern, num_layers
from megatron_mm.data.loading.reader import Prompt
from megatron_mm.data.sample import Sample
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.earl.router_reward import hit_sums, label_positions
from megatron_mm.earl.settings import EARLConfig
from megatron_mm.earl.skill_map import SkillMap, load_skill_map, shuffled
from megatron_mm.earl.spans import (
    Label,
    Labeller,
    Span,
    answer_labels,
    check_taught,
    load_labeller,
    token_labels,
)
from megatron_mm.errors import DataError, RLError
from megatron_mm.generation.lanes import Completion
from megatron_mm.parallel.groups import Groups

CONTROL_SEED = 0  # of the shuffled map that hit rates are compared with


@dataclass(frozen=True)
class Maps:
    """A skill map and its shuffled copies.

    Attributes:
        found: the map as it was discovered.
        used: the map that is rewarded and taught: `found`, or its shuffled copy as a control run.
        control: a shuffled copy, whose hit rates the metrics show beside those of `found`.
    """

    found: SkillMap
    used: SkillMap
    control: SkillMap

    @classmethod
    def of(cls, run: RunConfig) -> Maps | None:
        """Reads the map that the settings name; None if they name none.

        Raises:
            RLError: for a map that cannot be used; one of format 1 where clusters must be
                exclusive, for an expert scope and for alignment; one found with other labels.
        """
        earl, language = run.section(EARLConfig), run.model.language
        if not earl.skill_map:
            return None
        layers = num_layers(effective_pattern(run.model))
        sizes = layers, language.num_experts, language.moe_router_topk
        exclusive = earl.expert_scope or earl.router_align_coeff > 0
        found = load_skill_map(earl.skill_map, *sizes, exclusive=exclusive)
        labeller = found.info.get("labeller", earl.span_labels)
        if labeller != earl.span_labels:
            raise RLError(
                f"skill map {earl.skill_map} was found with the labels of {labeller}, span_labels "
                f"is {earl.span_labels}: its experts serve other tokens; set span_labels"
            )
        seed = earl.skill_map_shuffle_seed
        control = shuffled(found, CONTROL_SEED if seed is None else seed)
        return cls(found, found if seed is None else control, control)


def expert_scope(run: RunConfig) -> torch.Tensor | None:
    """Returns bool [S, L, E], the experts that learn from a skill's positions; None: every expert
    learns from all.

    Raises:
        RLError: for a map that cannot be used.
    """
    maps = Maps.of(run) if run.section(EARLConfig).expert_scope else None
    return None if maps is None else maps.used.membership()


@dataclass(frozen=True)
class Hits:
    """`hit_sums` over all layers of the model, one for each of the `Maps`; fp64 [N, S, 4]."""

    found: torch.Tensor
    used: torch.Tensor
    control: torch.Tensor


@dataclass(frozen=True)
class Alignment:
    """A run's skill maps and its labeller.

    Attributes:
        maps: None: skills have no experts, only the spans' correctness matters.
        on_missing: "error" or "skip", for a skill without a cluster.
    """

    maps: Maps | None
    labeller: Labeller
    on_missing: str

    @classmethod
    def of(cls, run: RunConfig) -> Alignment | None:
        """Reads the map and the labeller that the settings name; None if they ask for nothing
        about skills.

        Raises:
            RLError: for a map or a labeller that cannot be used.
        """
        earl = run.section(EARLConfig)
        if not (earl.skill_map or earl.span_credit):
            return None
        return cls(Maps.of(run), load_labeller(earl.span_labels), earl.on_missing_cluster)

    def spans(
        self, prompt: Prompt, completion: Completion, tokenizer: Tokenizer
    ) -> tuple[list[Span], int]:
        """Returns the labelled spans of a completion, and how many have a skill without a cluster.

        Raises:
            DataError, RLError: the row's spans cannot be used, or a skill has no cluster.
        """
        ids = completion.tokens_G.tolist()
        labels = token_labels(prompt.row, ids, tokenizer, self.labeller, prompt.where)
        skills, missing = self._skill_ids(labels, prompt.where)
        spans = [
            (label.start, label.stop, skill, label.correct)
            for label, skill in zip(labels, skills, strict=True)
        ]
        return spans, missing

    def row_skills(
        self, tokenizer: Tokenizer, row: Mapping[str, Any], where: str, sample: Sample
    ) -> torch.Tensor:
        """Returns the skill of each position of a training row, int64 [tokens]: that of the
        labelled span of its answer in which the next token lies, else -1. The answer is what the
        row teaches, so its clauses must be its spans.

        Args:
            where: "file:row", for messages.
            sample: what training makes of the row.
        Raises:
            DataError: the row's spans cannot be used, or a skill has no cluster.
        """
        try:
            answer, labels = answer_labels(row, tokenizer, self.labeller, where)
            check_taught(row, labels, self.labeller, where)
            skills, _ = self._skill_ids(labels, where)
        except RLError as error:
            raise DataError(str(error)) from None
        skill_T, at_A = torch.full_like(sample.tokens_T, -1), sample.predicting(answer)
        for label, skill in zip(labels, skills, strict=True):
            skill_T[at_A[label.start : label.stop]] = skill
        # Words of places that the text lacks have the skill of their query, as in a completion.
        places = torch.tensor(sample.added, dtype=torch.int64)
        behind = torch.searchsorted(torch.tensor(sample.queries, dtype=torch.int64), places)
        asks = torch.tensor((*sample.queries, 0), dtype=torch.int64)[behind]
        skill_T[places - 1] = skill_T[asks - 1]
        return skill_T

    def _skill_ids(self, labels: Sequence[Label], where: str) -> tuple[list[int], int]:
        if self.maps is None:
            return [-1] * len(labels), 0
        names = [label.skill for label in labels]
        return self.maps.found.skill_ids(names, where, self.on_missing)


def count_hits(
    maps: Maps,
    completions: Sequence[Completion],
    spans: Sequence[Sequence[Span]],
    layers: Sequence[int],
    groups: Groups,
) -> Hits:
    """Counts how often the labelled tokens of a replica's completions met the experts of their
    skill. Every rank of the replica calls it.

    Args:
        spans: one list for each completion.
        layers: moe indices of this rank's layers, ascending.
    """
    skills = len(maps.found.names)
    total = torch.zeros(3, len(completions), skills, 4, dtype=torch.float64)
    if layers and completions and groups.pg.tp_cp.rank() == 0:
        total = local_hits(maps, completions, spans, layers)
    dist.all_reduce(total, group=groups.replica)
    return Hits(*total)


def local_hits(
    maps: Maps,
    completions: Sequence[Completion],
    spans: Sequence[Sequence[Span]],
    layers: Sequence[int],
) -> torch.Tensor:
    """Returns fp64 [3, N, S, 4]: `hit_sums` of the first hop over one rank's layers, in the order
    of `Hits`."""
    labelled = [
        label_positions(len(c.tokens_G), marks) for c, marks in zip(completions, spans, strict=True)
    ]
    routes_TLk = torch.cat([c.routes_GLk for c in completions])
    routes_TLk = routes_TLk[:, :, : maps.found.moe_router_topk]
    skill_T = torch.cat([skill for skill, _ in labelled])
    correct_T = torch.cat([correct for _, correct in labelled])
    lengths_N = torch.tensor([len(c.tokens_G) for c in completions])
    owner_T = torch.arange(len(completions)).repeat_interleave(lengths_N)
    return torch.stack(
        [
            hit_sums(
                routes_TLk,
                skill_T,
                correct_T,
                owner_T,
                len(completions),
                each.membership()[:, list(layers)],
            )
            for each in (maps.found, maps.used, maps.control)
        ]
    )

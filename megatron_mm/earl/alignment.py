"""EARL in the loop: which tokens exercise which skill, and how often they met its experts.

Routes stay on the ranks of their layers; only sums of each completion travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_mm.config import RunConfig, effective_pattern, num_layers
from megatron_mm.data.loading.reader import Prompt
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.earl.router_reward import hit_sums, label_positions
from megatron_mm.earl.settings import EARLConfig
from megatron_mm.earl.skill_map import SkillMap, load_skill_map, shuffled
from megatron_mm.earl.spans import Labeller, load_labeller, token_labels
from megatron_mm.generation.lanes import Completion
from megatron_mm.parallel.groups import Groups

CONTROL_SEED = 0  # of the shuffled map that metrics are compared with

# (first token, end, skill id or -1, right or not)
Span = tuple[int, int, int, bool]


@dataclass(frozen=True)
class Alignment:
    """
    Attributes:
        found: the map as it was found; None: skills have no experts, only spans matter.
        used: what is rewarded; the found one, or for the control its shuffled copy.
        control: a shuffled copy, to compare hit rates with.
    """

    found: SkillMap | None
    used: SkillMap | None
    control: SkillMap | None
    labeller: Labeller
    on_missing: str

    @classmethod
    def of(cls, run: RunConfig) -> Alignment | None:
        """None if the settings ask for nothing about skills. Raises RLError for a map or a labeller
        that cannot be used."""
        rl, language = run.section(EARLConfig), run.model.language
        if not (rl.skill_map or rl.span_credit):
            return None
        found = used = control = None
        if rl.skill_map:
            layers = num_layers(effective_pattern(run.model))
            sizes = layers, language.num_experts, language.moe_router_topk
            found = used = load_skill_map(rl.skill_map, *sizes)
            seed = rl.skill_map_shuffle_seed
            control = shuffled(found, CONTROL_SEED if seed is None else seed)
            if seed is not None:
                used = control
        labeller = load_labeller(rl.span_labels)
        return cls(found, used, control, labeller, rl.on_missing_cluster)

    def spans(
        self, prompt: Prompt, completion: Completion, tokenizer: Tokenizer
    ) -> tuple[list[Span], int]:
        """The labelled spans of a completion, and how many have a skill without a cluster.

        Raises:
            DataError, RLError: the row's spans cannot be used, or a skill has no cluster.
        """
        ids = completion.tokens_G.tolist()
        labels = token_labels(prompt.row, ids, tokenizer, self.labeller, prompt.where)
        skills, missing = [-1] * len(labels), 0
        if self.found is not None:
            names = [label.skill for label in labels]
            skills, missing = self.found.skill_ids(names, prompt.where, self.on_missing)
        spans = [
            (label.start, label.stop, skill, label.correct)
            for label, skill in zip(labels, skills, strict=True)
        ]
        return spans, missing

    def sums(
        self,
        completions: Sequence[Completion],
        spans: Sequence[Sequence[Span]],
        layers: Sequence[int],
        groups: Groups,
    ) -> dict[str, torch.Tensor]:
        """`hit_sums`, fp64 [N, S, 4], of the maps `used`, `found` and `control`, over all layers of
        the model. Every rank of the replica calls it.

        Args:
            layers: moe indices of this rank's layers, ascending.
        """
        maps = {"used": self.used, "found": self.found, "control": self.control}
        skills = len(self.found.names)
        total = torch.zeros(len(maps), len(completions), skills, 4, dtype=torch.float64)
        if layers and completions and groups.pg.tp_cp.rank() == 0:
            labelled = [
                label_positions(len(c.tokens_G), marks)
                for c, marks in zip(completions, spans, strict=True)
            ]
            # The positions whose logits were sampled are the last G that any router saw.
            routes = torch.cat([c.routes_SLk[-len(c.tokens_G) :] for c in completions])
            skill_T = torch.cat([skill for skill, _ in labelled])
            correct_T = torch.cat([correct for _, correct in labelled])
            lengths = torch.tensor([len(c.tokens_G) for c in completions])
            owner_T = torch.arange(len(completions)).repeat_interleave(lengths)
            for row, chosen in enumerate(maps.values()):
                member_SLE = chosen.membership()[:, list(layers)]
                total[row] = hit_sums(
                    routes, skill_T, correct_T, owner_T, len(completions), member_SLE
                )
        dist.all_reduce(total, group=groups.replica)
        return dict(zip(maps, total, strict=True))

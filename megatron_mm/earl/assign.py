"""Clusters of experts that skills do not share: a common one, and one for each skill.

Shapes: L layers, E experts, S skills.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

import torch

from megatron_mm.earl.stability import Stability
from megatron_mm.errors import RLError

DRAWS = 300  # of random assignments, whose agreement is chance


@dataclass(frozen=True)
class Assignment:
    """Exclusive clusters.

    Attributes:
        common: for each layer its common experts, ascending.
        skills: [S][L], the experts of each skill, ascending; as many for each.
    """

    common: list[list[int]]
    skills: list[list[list[int]]]


def cluster_sizes(
    experts: int, k: int, skills: int, own: int | None, common: int | None
) -> tuple[int, int]:
    """Returns (experts of each skill, common experts) in a layer. Where they are not given: k
    common ones; for a skill k, or as many as there are for each.

    Raises:
        RLError: if a layer has too few experts.
    """
    common = min(k, experts) if common is None else common
    if own is None:
        own = max(1, min(k, (experts - common) // skills))
    needed = skills * own + common
    if needed > experts:
        raise RLError(
            f"{skills} skills x {own} experts of their own + {common} common ones are {needed}, a "
            f"layer has {experts}; lower --cluster-size or --common-size, or label fewer skills"
        )
    return own, common


def assign(effect_SLE: torch.Tensor, used_LE: torch.Tensor, own: int, common: int) -> Assignment:
    """Assigns experts to skills.

    In each layer the `common` experts that are used most are common. Of the others each skill gets
    `own`, so that the sum of effects, each over its skill's largest, is greatest: the Hungarian
    method (Kuhn 1955). Experts that remain belong to no skill.

    Args:
        effect_SLE: of each expert on each skill.
        used_LE: how often positions without a skill chose each expert.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    value_SLE = relative(effect_SLE)
    skills, _, experts = value_SLE.shape
    found = Assignment(most_used(used_LE, common), [[] for _ in range(skills)])
    for layer, inside in enumerate(found.common):
        free = [expert for expert in range(experts) if expert not in inside]
        # A row for each place in a cluster.
        value = value_SLE[:, layer, free].repeat_interleave(own, 0)
        rows, columns = linear_sum_assignment(value.numpy(), maximize=True)
        for s in range(skills):
            taken = [free[c] for r, c in zip(rows, columns, strict=True) if r // own == s]
            found.skills[s].append(sorted(taken))
    return found


def most_used(used_LE: torch.Tensor, count: int) -> list[list[int]]:
    """Returns for each layer the `count` experts that are used most, ascending; of equally used
    ones the first."""
    order_LE = used_LE.argsort(dim=1, descending=True, stable=True)
    return order_LE[:, :count].sort(1).values.tolist()


def at_random(
    common: Sequence[Sequence[int]], experts: int, skills: int, own: int, generator: random.Random
) -> list[list[list[int]]]:
    """Returns clusters [S][L] of `own` experts, ascending, drawn from those that are not common."""
    found: list[list[list[int]]] = [[] for _ in range(skills)]
    for inside in common:
        free = [expert for expert in range(experts) if expert not in inside]
        order = generator.sample(free, len(free))
        for s, clusters in enumerate(found):
            clusters.append(sorted(order[s * own : (s + 1) * own]))
    return found


def relative(effect_SLE: torch.Tensor) -> torch.Tensor:
    """Returns the effects over their skill's largest; 0 for a skill that no removal harms."""
    largest_S11 = effect_SLE.amax((1, 2), keepdim=True)
    return torch.where(largest_S11 > 0, effect_SLE / largest_S11.clamp(min=1e-30), 0.0)


def own_and_others(assignment: Assignment, effect_SLE: torch.Tensor) -> torch.Tensor:
    """Returns fp64 [S, 2]: the mean effect of a skill's experts on the skill, and on the others."""
    skills = len(effect_SLE)
    found = []
    for s, clusters in enumerate(assignment.skills):
        cells = [(layer, e) for layer, inside in enumerate(clusters) for e in inside]
        layer_C, expert_C = torch.tensor(cells).T
        mean_S = effect_SLE[:, layer_C, expert_C].mean(1)
        found.append(torch.stack((mean_S[s], (mean_S.sum() - mean_S[s]) / max(1, skills - 1))))
    return torch.stack(found)


def agreement(one: Assignment, other: Assignment, experts: int, seed: int = 1) -> Stability:
    """Compares two assignments cluster by cluster. Chance is what random assignments of the same
    sizes give in place of `other`, beside its common experts."""
    generator = random.Random(seed)
    sizes = experts, len(other.skills), len(other.skills[0][0]), generator
    drawn = [_overlap(one.skills, at_random(other.common, *sizes)) for _ in range(DRAWS)]
    found = _overlap(one.skills, other.skills)
    shared = [shared for shared, _ in drawn]
    spread = pstdev(shared)
    z = (found[0] - fmean(shared)) / spread if spread > 0 else 0.0
    cells = len(one.skills) * len(other.common)
    return Stability(found[1], fmean(jaccard for _, jaccard in drawn), z, cells)


def _overlap(
    one: Sequence[Sequence[Sequence[int]]], other: Sequence[Sequence[Sequence[int]]]
) -> tuple[int, float]:
    """Returns (shared experts, mean Jaccard of the clusters)."""
    shared, jaccard = 0, []
    for layers, others in zip(one, other, strict=True):
        for a, b in zip(layers, others, strict=True):
            both = len({*a} & {*b})
            shared += both
            jaccard.append(both / len({*a} | {*b}))
    return shared, fmean(jaccard)

"""Tests of a skill map: its stability, whether it is more than chance; its selectivity, whether the
experts matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt

import torch

Clusters = Sequence[Sequence[Sequence[int]]]  # [skill][layer]: experts

MIN_Z = 3.0


@dataclass(frozen=True)
class Stability:
    """The agreement of the clusters of two halves of the probe."""

    jaccard: float  # shared experts over all, mean over the skills and layers with a cluster
    chance: float  # the same, expected for random clusters of these sizes
    z: float  # shared experts beyond chance, in standard deviations
    cells: int  # skills x layers with a cluster in either half

    @property
    def above_chance(self) -> bool:
        return self.z >= MIN_Z


def stability(one: Clusters, other: Clusters, num_experts: int) -> Stability:
    """Compares two maps cluster by cluster. Chance is hypergeometric: each cluster drawn
    independently of the other. Clusters count as independent, which those of one layer are not
    quite."""
    overlap = chance = excess = variance = 0.0
    cells = 0
    for layers, others in zip(one, other, strict=True):
        for a, b in zip(layers, others, strict=True):
            if not a and not b:
                continue
            cells += 1
            shared = len({*a} & {*b})
            overlap += shared / len({*a} | {*b})
            chance += _chance_jaccard(len(a), len(b), num_experts)
            excess += shared - len(a) * len(b) / num_experts
            variance += _overlap_variance(len(a), len(b), num_experts)
    if not cells:
        return Stability(0.0, 0.0, 0.0, 0)
    z = excess / sqrt(variance) if variance > 0 else 0.0
    return Stability(overlap / cells, chance / cells, z, cells)


def correlation(lift_LES: torch.Tensor, other_LES: torch.Tensor) -> float:
    """Returns Pearson's correlation of the log lifts of two halves; 0 if either is constant."""
    pair = torch.stack((lift_LES.flatten(), other_LES.flatten())).double().log()
    pair = pair - pair.mean(1, keepdim=True)
    norm = pair.norm(dim=1).prod()
    return float(pair.prod(0).sum() / norm) if norm > 1e-12 else 0.0


def stability_warning(
    given_token: Stability,
    without_token: Stability,
    information: float = 0.0,
    shuffled: Sequence[float] = (),
) -> str | None:
    """Returns one line for the user if the map is not to be relied on.

    Args:
        given_token: of the clusters in the map.
        without_token: of the clusters found from the same halves without regard to the token.
        information: between experts and skills given the token, in nats.
        shuffled: the same with the rows' skills shuffled among them.
    """
    if given_token.above_chance:
        if all(information > other for other in shuffled):
            return None
        return (
            "the clusters are no better than chance: with the skills shuffled among the rows "
            f"routes tell as much of them ({information:.4f} nats given the token, shuffled up to "
            f"{max(shuffled):.4f}); probe more samples, or train further before discovering"
        )
    numbers = _numbers(given_token)
    if without_token.above_chance:
        return (
            "the clusters only re-discover the token: without regard to it the two halves agree "
            f"({_numbers(without_token)}), given the token they agree no better than chance "
            f"({numbers}); these experts follow words, not skills"
        )
    return (
        f"the clusters are no better than chance: the two halves of the probe agree as random "
        f"ones would ({numbers}); probe more samples, or train further before discovering"
    )


def own_and_others_fall(
    accuracy_S: torch.Tensor, without_SS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns two [S], the causal test: how far a skill's accuracy falls when its own cluster is
    forbidden, and how far the other skills' accuracies do (mean). Their difference is the cluster's
    selectivity, about 0 if it is nothing special.

    Args:
        accuracy_S: with all experts.
        without_SS: [i, j] is the accuracy of skill j with i's cluster forbidden.
    """
    fall_SS = accuracy_S - without_SS
    own_S = fall_SS.diagonal()
    others = max(len(accuracy_S) - 1, 1)
    return own_S, (fall_SS.sum(1) - own_S) / others


def assignment_warning(
    halves: Stability, selective: float = 0.0, shuffled: Sequence[float] = ()
) -> str | None:
    """Returns one line for the user if an exclusive map is not to be relied on.

    Args:
        halves: agreement of the assignments from the two halves.
        selective: how much more a skill's experts matter to it than to the others.
        shuffled: the same with the rows' skills shuffled among them.
    """
    if not halves.above_chance:
        return (
            "the clusters are no better than chance: the two halves of the probe assign experts as "
            f"at random ({_numbers(halves)}); probe more samples, or train further before "
            "discovering"
        )
    if any(selective <= other for other in shuffled):
        return (
            "the clusters are no better than chance: with the skills shuffled among the rows they "
            f"are as selective ({selective:.3f} of a skill's largest effect beyond the other "
            f"skills', shuffled up to {max(shuffled):.3f}); probe more samples, or train further "
            "before discovering"
        )
    return None


def _numbers(found: Stability) -> str:
    return f"Jaccard {found.jaccard:.2f}, chance {found.chance:.2f}, z {found.z:.1f}"


def _chance_jaccard(a: int, b: int, num_experts: int) -> float:
    ways = comb(num_experts, b)
    shared = range(max(0, a + b - num_experts), min(a, b) + 1)
    return sum(comb(a, i) * comb(num_experts - a, b - i) / ways * i / (a + b - i) for i in shared)


def _overlap_variance(a: int, b: int, num_experts: int) -> float:
    if num_experts < 2:
        return 0.0
    free = (num_experts - a) * (num_experts - b)
    return a * b * free / (num_experts**2 * (num_experts - 1))

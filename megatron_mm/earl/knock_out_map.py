"""Skill maps from a knock-out: exclusive clusters, and tests of whether they are more than chance.

Clusters are assigned three times: from the whole probe, which is the map, and from each half. The
halves must agree better than random assignments would. The clusters of one half are also measured
on the other: a removal must harm the skill more than other skills, and more so than with the rows'
skills shuffled (a permutation test). Lift and information of the routes stand beside these, as
diagnostics.

Shapes: L layers, E experts, S skills, J labellings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_mm.earl.assign import (
    Assignment,
    agreement,
    assign,
    cluster_sizes,
    own_and_others,
    relative,
)
from megatron_mm.earl.count_probe import ProbeCounts
from megatron_mm.earl.knock_out import LossSums
from megatron_mm.earl.make_map import Discovery, information_of, route_rows
from megatron_mm.earl.removals import Removal, effects
from megatron_mm.earl.route_counts import lifts
from megatron_mm.earl.skill_map import SkillMap
from megatron_mm.earl.stability import assignment_warning
from megatron_mm.errors import RLError

DIGITS = 5  # of the effects in the map's file, in nats


@dataclass(frozen=True)
class Effects:
    """The effect of removing each expert, in nats per token.

    Attributes:
        whole_JSLE, halves_HJSLE: fp64, over the probe and over each half.
    """

    whole_JSLE: torch.Tensor
    halves_HJSLE: torch.Tensor

    @classmethod
    def of(cls, sums: LossSums, planned: Sequence[Removal], layers: int, experts: int) -> Effects:
        """Computes the effects of the skills and labellings that were summed."""

        def found(halves: Sequence[int]) -> torch.Tensor:
            rise_PJS = sums.rises(halves)
            flat = effects(rise_PJS.flatten(1), planned, layers, experts)
            return flat.unflatten(0, rise_PJS.shape[1:])

        return cls(found((0, 1)), torch.stack([found((0,)), found((1,))]))


def discover_by_knock_out(
    sums: LossSums,
    planned: Sequence[Removal],
    counted: ProbeCounts,
    skills: Sequence[str],
    *,
    moe_router_topk: int,
    cluster_size: int | None,
    common_size: int | None,
    info: Mapping[str, Any],
) -> Discovery:
    """Makes the map of a probe.

    Args:
        planned: the removals that were summed.
        skills: all labelled ones; those without a right span get no cluster.
        cluster_size, common_size: see `assign.cluster_sizes`.
        info: kept in the map, with the effects and the figures of its stability.
    Raises:
        RLError: if a layer has too few experts for exclusive clusters.
    """
    counts = counted.halves[0] + counted.halves[1]
    layers, experts, _, _ = counts.sizes
    measured = [s for s in range(len(skills)) if sums.tokens_HJS[:, 0, s].sum() > 0]
    names = [skills[s] for s in measured]
    sizes = cluster_sizes(experts, moe_router_topk, len(names), cluster_size, common_size)
    if not sums.nats_PHJS.isfinite().all():
        bad = int((~sums.nats_PHJS.isfinite()).flatten(1).any(1).sum())
        raise RLError(
            f"the loss of {bad} of {len(planned) + 1} passes is not finite; look for it in the "
            "checkpoint with an evaluation, or use --method lift"
        )
    # Shuffled labels may name skills that are not measured; their tokens are left out.
    sums = LossSums(sums.nats_PHJS[..., measured], sums.tokens_HJS[..., measured])
    found = Effects.of(sums, planned, layers, experts)
    used_HLE = counted.unlabelled_HLE
    assigned = assign(found.whole_JSLE[0], used_HLE.sum(0), *sizes)
    of_halves = [
        assign(of_half[0], used_LE, *sizes)
        for of_half, used_LE in zip(found.halves_HJSLE, used_HLE, strict=True)
    ]
    halves = agreement(of_halves[0], of_halves[1], experts)
    selective = [_selective(found, used_HLE, sizes, j) for j in range(len(found.whole_JSLE))]
    # One skill has no others to be shuffled with.
    shuffled = selective[1:] if len(names) > 1 else []
    warning = assignment_warning(halves, selective[0], shuffled)

    lift_LES = lifts(counts)
    clusters = dict(zip(names, assigned.skills, strict=True))
    nothing: list[list[int]] = [[] for _ in range(layers)]
    every = {skill: clusters.get(skill, nothing) for skill in skills}
    rows = route_rows(counts, lift_LES, every, moe_router_topk)
    across_S2 = _across(of_halves, found.halves_HJSLE[:, 0])
    for skill, (own, others) in zip(names, across_S2.tolist(), strict=True):
        rows[skill] |= {"own": own, "others": others}
    tokens_S = sums.tokens_HJS[:, 0].sum(0)
    info = dict(info) | {
        "method": "knock-out",
        "cluster_size": sizes[0],
        "common_size": sizes[1],
        "removals": len(planned),
        "positions": {skill: row["positions"] for skill, row in rows.items()},
        "without_cluster": [skill for skill in skills if skill not in clusters],
        "nats": _named(names, sums.nats_PHJS[0, :, 0].sum(0) / tokens_S.clamp(min=1)),
        "knock_out": _named(names, found.whole_JSLE[0]),
        "lift": _named(skills, lift_LES.permute(2, 0, 1)),
        "lift_rank_correlation": _rank_correlation(
            lift_LES.permute(2, 0, 1)[measured], found.whole_JSLE[0]
        ),
        "own_and_others": _named(names, across_S2),
        "selective": selective[0],
        "selective_shuffled": selective[1:],
        "stability": asdict(halves),
        "warning": warning,
    }
    skill_map = SkillMap(
        layers,
        experts,
        moe_router_topk,
        clusters,
        info | information_of(counts, counted.shuffled),
        common=assigned.common,
    )
    score_SLE = torch.zeros(len(skills), layers, experts, dtype=torch.float64)
    score_SLE[measured] = relative(found.whole_JSLE[0])
    return Discovery(skill_map, list(skills), score_SLE, rows, warning, knocked_out=True)


def _across(of_halves: Sequence[Assignment], halves_HSLE: torch.Tensor) -> torch.Tensor:
    """Returns [S, 2], `own_and_others` of each half's clusters by the other half's effects."""
    return (
        own_and_others(of_halves[0], halves_HSLE[1]) + own_and_others(of_halves[1], halves_HSLE[0])
    ) / 2


def _selective(
    found: Effects, used_HLE: torch.Tensor, sizes: tuple[int, int], labelling: int
) -> float:
    """Returns how much more a skill's experts matter to it than to the others, over its largest
    effect, mean over the skills: clusters of one half, effects of the other."""
    effect_HSLE = found.halves_HJSLE[:, labelling]
    of_halves = [
        assign(effect_SLE, used_LE, *sizes)
        for effect_SLE, used_LE in zip(effect_HSLE, used_HLE, strict=True)
    ]
    scaled_HSLE = torch.stack([relative(effect_SLE) for effect_SLE in effect_HSLE])
    own_S, others_S = _across(of_halves, scaled_HSLE).unbind(1)
    return float((own_S - others_S).mean())


def _named(names: Sequence[str], values: torch.Tensor) -> dict[str, Any]:
    """Returns the values of each skill, rounded, as plain JSON."""
    rounded = values.double().round(decimals=DIGITS).tolist()
    return dict(zip(names, rounded, strict=True))


def _rank_correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Returns Spearman's rank correlation; equal values get ranks in their order."""
    ranks = [values.flatten().argsort(stable=True).argsort().double() for values in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])

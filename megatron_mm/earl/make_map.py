"""Skill maps from route counts, and tests of whether a map is more than chance.

The probe is counted in two halves. The map is made from both. Two clusterings, one from each half,
are compared: if they agree no better than random ones, the map is chance; if they agree only
without regard to the token, the experts follow words (`stability.py`). This test assumes that
clusters are independent. Routes of a row's positions and layers are not, so a permutation test
follows: the information in the routes is compared with that under the rows' skills shuffled.

Shapes: L layers, E experts, S skills.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from megatron_mm.earl.route_counts import RouteCounts, choose_clusters, lifts, mutual_information
from megatron_mm.earl.skill_map import SkillMap
from megatron_mm.earl.stability import (
    correlation,
    own_and_others_fall,
    stability,
    stability_warning,
)
from megatron_mm.errors import RLError

MERGE_AT = 2**20  # cells that are held before they are merged


@dataclass
class Tally:
    """A sum of route counts. Additions are postponed and done together, since each sorts all
    cells."""

    merged: RouteCounts | None = None
    waiting: list[RouteCounts] = field(default_factory=list)

    def add(self, counts: RouteCounts) -> None:
        self.waiting.append(counts)
        held = 0 if self.merged is None else len(self.merged.cells)
        if sum(len(other.cells) for other in self.waiting) > max(MERGE_AT, held):
            self.total()

    def total(self) -> RouteCounts | None:
        for counts in self.waiting:
            self.merged = counts if self.merged is None else self.merged + counts
        self.waiting.clear()
        return self.merged


def on_layers(counts: RouteCounts, layers: Sequence[int], num_layers: int) -> RouteCounts:
    """Returns the counts of some layers (ascending) as counts of a model of `num_layers`."""
    _, experts, skills, tokens = counts.sizes
    span = experts * skills * tokens
    cells = torch.tensor(layers)[counts.cells // span] * span + counts.cells % span
    return RouteCounts((num_layers, experts, skills, tokens), cells, counts.counts)


@dataclass(frozen=True)
class Discovery:
    """A skill map, and the figures of each skill.

    Attributes:
        skills: all that were probed; the map holds those that have a cluster.
        score_SLE: of all `skills`: the lift of each expert given the token, or the rise of the loss
            without it over its skill's largest.
        knocked_out: whether it is the latter.
        rows: skill -> positions, experts per layer, mean lift, hit share and its chance. They come
            from the probe that the map was made from, so they flatter it. With a knock-out also
            `own` and `others`, in nats, of clusters from one half measured on the other.
        warning: one line if the map is not to be relied on.
    """

    skill_map: SkillMap
    skills: list[str]
    score_SLE: torch.Tensor
    rows: dict[str, dict[str, float]]
    warning: str | None
    knocked_out: bool = False


def discover_by_lift(
    halves: Sequence[RouteCounts],
    shuffled: Sequence[RouteCounts],
    skills: Sequence[str],
    *,
    moe_router_topk: int,
    cluster_size: int,
    min_lift: float,
    info: Mapping[str, Any],
) -> Discovery:
    """Makes the map of a probe.

    Args:
        halves: route counts of each half.
        shuffled: counts of both halves with skills exchanged among rows, one for each shuffle.
        cluster_size: most experts of a skill in a layer; min_lift: the lift that each needs.
        info: kept in the map, with the figures of its stability.
    Raises:
        RLError: if no skill has an expert of `min_lift`.
    """
    counts = halves[0] + halves[1]
    layers, experts, _, _ = counts.sizes
    lift_LES = lifts(counts)
    clusters = choose_clusters(lift_LES, cluster_size, min_lift)
    named = {skill: cluster for skill, cluster in zip(skills, clusters, strict=True)}
    kept = {skill: cluster for skill, cluster in named.items() if any(cluster)}
    if not kept:
        raise RLError(
            f"no expert of {layers} x {experts} has a lift of {min_lift:g} for any of "
            f"{len(skills)} skills, the highest is {float(lift_LES.max()):.3g}; lower --min-lift "
            "or train further before discovering"
        )
    agreement = {}
    for given_token in (True, False):
        found = [lifts(half, given_token) for half in halves]
        one, other = (choose_clusters(lift, cluster_size, min_lift) for lift in found)
        agreement[given_token] = stability(one, other, experts)
        if given_token:
            correlated = correlation(*found)
    information = information_of(counts, shuffled)
    total = sum(information["mutual_information"]) / layers
    by_shuffling = information["mutual_information_shuffled"]
    warning = stability_warning(agreement[True], agreement[False], total, by_shuffling)
    rows = route_rows(counts, lift_LES, named, moe_router_topk)
    info = dict(info) | {
        "method": "lift",
        "cluster_size": cluster_size,
        "min_lift": min_lift,
        "positions": {skill: row["positions"] for skill, row in rows.items()},
        "without_cluster": [skill for skill in skills if skill not in kept],
        "use": shares_of_use(counts, skills),
        "stability": asdict(agreement[True]),
        "stability_without_token": asdict(agreement[False]),
        "lift_correlation": correlated,
        "warning": warning,
    }
    skill_map = SkillMap(layers, experts, moe_router_topk, kept, info | information)
    return Discovery(skill_map, list(skills), lift_LES.permute(2, 0, 1), rows, warning)


def measure(
    halves: Sequence[RouteCounts],
    shuffled: Sequence[RouteCounts],
    skills: Sequence[str],
    skill_map: SkillMap,
    info: Mapping[str, Any],
) -> Discovery:
    """Measures the clusters of a given map on a probe, such as a map found before training. The
    clusters stay; `rows` and the information come from these counts. Arguments as in
    `discover_by_lift`."""
    counts = halves[0] + halves[1]
    lift_LES = lifts(counts)
    nothing: list[list[int]] = [[] for _ in range(skill_map.num_layers)]
    named = {skill: skill_map.skills.get(skill, nothing) for skill in skills}
    rows = route_rows(counts, lift_LES, named, skill_map.moe_router_topk)
    info = skill_map.info | dict(info) | information_of(counts, shuffled) | {"measured": rows}
    score_SLE = lift_LES.permute(2, 0, 1)
    return Discovery(replace(skill_map, info=info), list(skills), score_SLE, rows, None)


def information_of(counts: RouteCounts, shuffled: Sequence[RouteCounts]) -> dict[str, Any]:
    """Returns the information between experts and skills given the token, in nats: of each layer,
    by chance, and with the skills shuffled."""
    information = [mutual_information(counts.layer(layer)) for layer in range(counts.sizes[0])]
    return {
        "mutual_information": [nats for nats, _ in information],
        "mutual_information_by_chance": [chance for _, chance in information],
        "mutual_information_shuffled": [_mean_information(other) for other in shuffled],
    }


def _mean_information(counts: RouteCounts) -> float:
    """Returns the information given the token in nats, mean over the layers."""
    layers = counts.sizes[0]
    return sum(mutual_information(counts.layer(layer))[0] for layer in range(layers)) / layers


def shares_of_use(counts: RouteCounts, skills: Sequence[str]) -> dict[str, list[list[float]]]:
    """Returns skill -> for each layer each expert's share of the skill's routes, rounded."""
    chosen_LES = counts.sums()
    share_LES = chosen_LES / chosen_LES.sum(1, keepdim=True).clamp(min=1)
    rounded_SLE = share_LES.permute(2, 0, 1).round(decimals=4)
    return dict(zip(skills, rounded_SLE.tolist(), strict=True))


def route_rows(
    counts: RouteCounts, lift_LES: torch.Tensor, clusters: Mapping[str, list[list[int]]], k: int
) -> dict[str, dict[str, float]]:
    """Returns the figures of each skill's routes, as `Discovery.rows`."""
    layers, experts = counts.sizes[:2]
    chosen_LES = counts.sums()
    rows = {}
    for s, (skill, cluster) in enumerate(clusters.items()):
        member_LE = torch.zeros(layers, experts, dtype=torch.bool)
        for layer, inside in enumerate(cluster):
            member_LE[layer, inside] = True
        clustered = member_LE.any(1)
        share_LE = chosen_LES[:, :, s] / chosen_LES[:, :, s].sum(1, keepdim=True).clamp(min=1)
        size = int(member_LE.sum())
        rows[skill] = {
            "positions": int(chosen_LES[0, :, s].sum()) // k,
            "experts": size / layers,
            "lift": float(lift_LES[:, :, s][member_LE].mean()) if size else 1.0,
            "hit": float((share_LE * member_LE).sum(1)[clustered].mean()) if size else 0.0,
            "chance": float(member_LE.double().mean(1)[clustered].mean()) if size else 0.0,
        }
    return rows


def causal_test(accuracy: Mapping[str, float], without: Mapping[str, Mapping[str, float]]) -> dict:
    """Returns the results of the causal test for `SkillMap.info`, as plain JSON.

    Args:
        accuracy: of each skill, with all experts.
        without: skill -> the same with that skill's cluster forbidden.
    """
    skills = list(without)
    accuracy_S = torch.tensor([accuracy[skill] for skill in skills], dtype=torch.float64)
    rows = [[without[skill][other] for other in skills] for skill in skills]
    own_S, others_S = own_and_others_fall(accuracy_S, torch.tensor(rows, dtype=torch.float64))
    figures = {"own": own_S, "others": others_S, "selectivity": own_S - others_S}
    return {
        "accuracy": dict(accuracy),
        "without": {skill: dict(without[skill]) for skill in skills},
    } | {name: dict(zip(skills, of.tolist(), strict=True)) for name, of in figures.items()}

"""From counted routes to a skill map, and whether to believe it.

The probe is counted in two halves. The map is made of both; how far clusters made of each alone
agree says whether they are more than chance, and the same without regard to the token whether
they are only words (`stability.py`). That test takes clusters for independent. Routes of a row's
positions and layers are not, so the information they hold is also compared with that under the
same rows' skills shuffled among them (a permutation test).

Shapes: L layers, E experts, S skills.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from megatron_mm.earl.route_counts import RouteCounts, choose_clusters, lifts, mutual_information
from megatron_mm.earl.skill_map import SkillMap
from megatron_mm.earl.stability import correlation, selectivity, stability, stability_warning
from megatron_mm.errors import RLError

MERGE_AT = 2**20  # cells that may wait before they are merged


@dataclass
class Tally:
    """Route counts of many microbatches, added up now and then: each addition sorts all cells."""

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
    """Counts of some layers (ascending) as counts of a model of `num_layers`."""
    _, experts, skills, tokens = counts.sizes
    span = experts * skills * tokens
    cells = torch.tensor(layers)[counts.cells // span] * span + counts.cells % span
    return RouteCounts((num_layers, experts, skills, tokens), cells, counts.counts)


@dataclass(frozen=True)
class Found:
    """A map, and per skill of it what a table shows.

    Attributes:
        lift_LES: given the token, of all skills in `skills`.
        skills: all that were probed; the map holds those that have a cluster.
        rows: skill -> positions, experts a layer, mean lift, hit share and its chance (these of
            the probe that the map was made of, so they flatter it).
    """

    skill_map: SkillMap
    skills: list[str]
    lift_LES: torch.Tensor
    rows: dict[str, dict[str, float]]
    warning: str | None


def discover(
    halves: Sequence[RouteCounts],
    shuffled: Sequence[RouteCounts],
    skills: Sequence[str],
    *,
    moe_router_topk: int,
    cluster_size: int,
    min_lift: float,
    info: Mapping[str, Any],
) -> Found:
    """The map of two halves of a probe. `info` is kept in it, with how stable it is. `shuffled`:
    counts of both with skills exchanged between rows, one for each time.

    Raises RLError if no skill has an expert of `min_lift`.
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
    told = _told(counts, shuffled)
    total = sum(told["mutual_information"]) / layers
    by_shuffling = told["mutual_information_shuffled"]
    warning = stability_warning(agreement[True], agreement[False], total, by_shuffling)
    rows = _rows(counts, lift_LES, named, moe_router_topk)
    info = dict(info) | {
        "cluster_size": cluster_size,
        "min_lift": min_lift,
        "positions": {skill: row["positions"] for skill, row in rows.items()},
        "without_cluster": [skill for skill in skills if skill not in kept],
        "stability": asdict(agreement[True]),
        "stability_without_token": asdict(agreement[False]),
        "lift_correlation": correlated,
        "warning": warning,
    }
    skill_map = SkillMap(layers, experts, moe_router_topk, kept, info | told)
    return Found(skill_map, list(skills), lift_LES, rows, warning)


def measure(
    halves: Sequence[RouteCounts],
    shuffled: Sequence[RouteCounts],
    skills: Sequence[str],
    skill_map: SkillMap,
    info: Mapping[str, Any],
) -> Found:
    """What the same counts say of a map that was found elsewhere, before training or with another
    model of the sizes: its clusters stay, `rows` and the information are these routes'."""
    counts = halves[0] + halves[1]
    lift_LES = lifts(counts)
    nothing: list[list[int]] = [[] for _ in range(skill_map.num_layers)]
    named = {skill: skill_map.skills.get(skill, nothing) for skill in skills}
    rows = _rows(counts, lift_LES, named, skill_map.moe_router_topk)
    info = skill_map.info | dict(info) | _told(counts, shuffled) | {"measured": rows}
    return Found(replace(skill_map, info=info), list(skills), lift_LES, rows, None)


def _told(counts: RouteCounts, shuffled: Sequence[RouteCounts]) -> dict[str, Any]:
    """What routes tell of skills given the token, in nats: by layer, and by chance."""
    information = [mutual_information(counts.layer(layer)) for layer in range(counts.sizes[0])]
    return {
        "mutual_information": [nats for nats, _ in information],
        "mutual_information_by_chance": [chance for _, chance in information],
        "mutual_information_shuffled": [_information(other) for other in shuffled],
    }


def _information(counts: RouteCounts) -> float:
    """Nats given the token, mean over the layers."""
    layers = counts.sizes[0]
    return sum(mutual_information(counts.layer(layer))[0] for layer in range(layers)) / layers


def _rows(
    counts: RouteCounts, lift_LES: torch.Tensor, clusters: Mapping[str, list[list[int]]], k: int
) -> dict[str, dict[str, float]]:
    layers, experts = counts.sizes[:2]
    chosen_LES = torch.stack([counts.layer(layer).sum(2) for layer in range(layers)])
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
    """What `SkillMap.info` keeps of the causal test, as plain JSON.

    Args:
        accuracy: of each skill, with all experts; `without`: skill -> the same with the skill's
            cluster forbidden.
    """
    skills = list(without)
    accuracy_S = torch.tensor([accuracy[skill] for skill in skills], dtype=torch.float64)
    rows = [[without[skill][other] for other in skills] for skill in skills]
    found = selectivity(accuracy_S, torch.tensor(rows, dtype=torch.float64)).tolist()
    return {
        "accuracy": dict(accuracy),
        "without": {skill: dict(without[skill]) for skill in skills},
        "selectivity": dict(zip(skills, found, strict=True)),
    }

"""Skill maps without a knock-out: exclusive clusters drawn at random.

Alignment makes the experts of a cluster those of its skill, whichever they were; a map drawn at
random costs one pass over the probe, where a knock-out costs one for every expert of every layer.

Shapes: L layers, E experts, S skills.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mm.earl.assign import at_random, cluster_sizes, most_used
from megatron_mm.earl.count_probe import ProbeCounts
from megatron_mm.earl.make_map import Discovery, information_of, route_rows, shares_of_use
from megatron_mm.earl.route_counts import lifts
from megatron_mm.earl.skill_map import SkillMap


def draw_map(
    counted: ProbeCounts,
    skills: Sequence[str],
    *,
    moe_router_topk: int,
    cluster_size: int | None,
    common_size: int | None,
    seed: int,
    info: Mapping[str, Any],
) -> Discovery:
    """Makes a map of a probe's skills. As after a knock-out, the experts that positions without a
    skill use most are common; each skill gets as many of the others, at random.

    Args:
        skills: all labelled ones; each gets a cluster.
        cluster_size, common_size: see `assign.cluster_sizes`.
        seed: of the draw.
        info: kept in the map, with the routes' lift and use as diagnostics.
    Raises:
        RLError: if a layer has too few experts for exclusive clusters.
    """
    counts = counted.halves[0] + counted.halves[1]
    layers, experts, _, _ = counts.sizes
    own, common = cluster_sizes(experts, moe_router_topk, len(skills), cluster_size, common_size)
    shared = most_used(counted.unlabelled_HLE.sum(0), common)
    drawn = at_random(shared, experts, len(skills), own, random.Random(seed))
    clusters = dict(zip(skills, drawn, strict=True))
    lift_LES = lifts(counts)
    rows = route_rows(counts, lift_LES, clusters, moe_router_topk)
    info = dict(info) | {
        "method": "random",
        "cluster_size": own,
        "common_size": common,
        "seed": seed,
        "positions": {skill: row["positions"] for skill, row in rows.items()},
        "use": shares_of_use(counts, skills),
    }
    info |= information_of(counts, counted.shuffled)
    skill_map = SkillMap(layers, experts, moe_router_topk, clusters, info, shared)
    return Discovery(skill_map, list(skills), lift_LES.permute(2, 0, 1), rows, None)

"""Maps from a teacher to a student: layers first, then the experts of each pair of layers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from megatron_mm.earl.skill_map import SkillMap
from megatron_mm.errors import RLError
from megatron_mm.mimic.batch import TopExperts
from megatron_mm.mimic.expert_map import ExpertMap
from megatron_mm.mimic.expert_match import by_clusters, by_skills, by_transport
from megatron_mm.mimic.layer_match import CrossSums, by_depth, monotone_matching
from megatron_mm.mimic.route_file import RouteFile
from megatron_mm.mimic.targets import whole_distribution

METHODS = ("transport", "clusters", "skills")


@dataclass(frozen=True)
class Student:
    """The layers of a student.

    Attributes:
        layers: those with experts, ascending; taught: those of them that learn.
    """

    layers: list[int]
    taught: list[int]
    num_experts: int


@dataclass(frozen=True)
class SkillMaps:
    """Skill maps of teacher and student."""

    teacher: SkillMap
    student: SkillMap


def match_layers(
    routes: RouteFile, student: Student, sums: CrossSums | None
) -> tuple[dict[int, int], dict[str, Any]]:
    """Returns student's layer -> teacher's, and how: by CKA, or without sums by depth."""
    if sums is None:
        chosen = by_depth(len(student.layers), routes.teacher.num_layers, routes.layers)
        matched = dict(zip(student.layers, chosen, strict=True))
        pairs = {mine: routes.layers[matched[mine]] for mine in student.taught}
        return pairs, {"layers_by": "depth"}
    cka_ST = sums.cka()[[student.layers.index(mine) for mine in student.taught]]
    chosen = monotone_matching(cka_ST)
    pairs = {m: routes.layers[t] for m, t in zip(student.taught, chosen, strict=True)}
    return pairs, {"layers_by": "cka", "cka": cka_ST.tolist()}


def make_map(
    method: str,
    routes: RouteFile,
    student: Student,
    sums: CrossSums | None,
    skills: SkillMaps | None,
    together_LTT: torch.Tensor | None,
) -> ExpertMap:
    """Makes a map.

    Args:
        sums: of a survey; needed by `transport`.
        skills: needed by `skills`.
        together_LTT: sums of p_T(a) p_T(a') in each recorded layer; needed by `clusters`.
    Raises:
        RLError: skill maps without a skill in common.
    """
    layers, info = match_layers(routes, student, sums)
    experts: dict[int, torch.Tensor] = {}
    for mine, theirs in layers.items():
        there = routes.layers.index(theirs)
        if method == "transport":
            assert sums is not None  # the command surveys for it
            here = student.layers.index(mine)
            experts[mine] = by_transport(sums.cross_STEE[here, there])
        elif method == "clusters":
            assert together_LTT is not None  # the command counts for it
            experts[mine] = by_clusters(together_LTT[there], student.num_experts)
        else:
            assert skills is not None  # the command reads them
            sizes = routes.teacher.num_experts, student.num_experts
            experts[mine] = by_skills(
                _clusters(skills.teacher, theirs), _clusters(skills.student, mine), sizes
            )
    info |= {"method": method, "source": routes.name}
    held = {index: a.float() for index, a in experts.items()}
    return ExpertMap(routes.teacher.identity, layers, held, info)


def check_skills(skills: SkillMaps) -> None:
    """Raises RLError for skill maps without a skill in common."""
    if not skills.teacher.skills.keys() & skills.student.skills.keys():
        raise RLError(
            f"the teacher's skill map names {', '.join(skills.teacher.names)}, the student's "
            f"{', '.join(skills.student.names)}: 0 skills in common; label both alike"
        )


def _clusters(skill_map: SkillMap, layer: int) -> dict[str, list[int]]:
    found = {skill: experts[layer] for skill, experts in skill_map.skills.items()}
    if skill_map.common is not None:
        found[""] = skill_map.common[layer]  # no skill has this name in both by chance
    return found


def routed_together(routes: RouteFile, samples: int | None) -> torch.Tensor:
    """Returns fp64 [L, E_T, E_T]: sums over recorded positions of p_T(a) p_T(a').

    Args:
        samples: rows that are read, drawn at random; None: all.
    Raises:
        DataError: a row is damaged.
    """
    experts = routes.teacher.num_experts
    total_LTT = torch.zeros(len(routes.layers), experts, experts, dtype=torch.float64)
    places = list(routes.places.items())
    if samples is not None and samples < len(places):
        places = random.Random(1).sample(places, samples)
    for (name, row), number in places:
        held = routes.recorded(number, f"{name}:{row}")
        for layer in range(len(routes.layers)):
            top = TopExperts(held.experts[:, layer], held.weights[:, layer])
            p_nE = whole_distribution(top, experts)  # fp32; a row has few positions
            total_LTT[layer] += p_nE.T @ p_nE
    return total_LTT

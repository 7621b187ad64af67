"""The skill map: the experts of each layer that serve each skill, as readable JSON. make_map.py
makes one.

    {"format": "megatron_mm skill map 2", "num_layers": 4, "num_experts": 8, "moe_router_topk": 2,
     "common": [[0, 3], [1, 2], [4, 5], [0, 6]],
     "skills": {"ocr": [[1, 5], [0, 4], [1, 3], [2, 7]], ...}, "info": {...}}

`skills` lists for each skill the experts of each layer, `common` the experts of tokens without a
skill; in a layer an expert belongs to one skill or to the common cluster. Format 1 has no `common`,
and there an expert may serve several skills. `info` says how the map was found and how stable it
is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron_mm.errors import RLError
from megatron_mm.outputs import whole_file

FORMAT = "megatron_mm skill map 2"
OVERLAPPING = "megatron_mm skill map 1"
MAX_BYTES = 2**26  # of a file; 1,000 skills of a model of 80 layers need 2**23
SIZES = ("num_layers", "num_experts", "moe_router_topk")
DRAWS = 200  # most orders of a layer's experts that are drawn for the shuffled map


@dataclass(frozen=True)
class SkillMap:
    """The experts of each skill in a model of these sizes.

    Attributes:
        skills: skill -> for each layer its experts, ascending; a layer may have none.
        common: for each layer the experts of tokens without a skill. With it the clusters are
            exclusive; None: an expert may serve several skills.
    Raises:
        RLError: if sizes and clusters do not fit each other, or clusters overlap beside a common
            one.
    """

    num_layers: int
    num_experts: int
    moe_router_topk: int
    skills: dict[str, list[list[int]]]
    info: dict[str, Any] = field(default_factory=dict)
    common: list[list[int]] | None = None

    def __post_init__(self) -> None:
        if not self.skills:
            raise RLError("a skill map with 0 skills; it needs at least 1")
        for skill, clusters in self.skills.items():
            _check_clusters(self, f"skill {skill!r}", clusters)
        if self.common is not None:
            _check_clusters(self, "the common cluster", self.common)
            _check_exclusive(self)

    @property
    def names(self) -> list[str]:
        """The skills in the order of their ids."""
        return list(self.skills)

    def membership(self) -> torch.Tensor:
        """Returns bool [S, L, E]: whether an expert is in the skill's cluster of that layer."""
        member_SLE = torch.zeros(
            len(self.skills), self.num_layers, self.num_experts, dtype=torch.bool
        )
        for s, clusters in enumerate(self.skills.values()):
            for layer, experts in enumerate(clusters):
                member_SLE[s, layer, experts] = True
        return member_SLE

    def clusters(self) -> torch.Tensor:
        """Returns bool [S + 1, L, E]: `membership`, and the common cluster as the last skill, so
        that -1, a token without a skill, is its number.

        Raises:
            RLError: for a map without a common cluster.
        """
        if self.common is None:
            raise RLError(
                "a skill map of format 1 has no common cluster; make it with --method knock-out "
                "or random"
            )
        everyone = {**self.skills, "": self.common}
        return replace(self, skills=everyone, common=None).membership()

    def skill_ids(
        self, labels: Sequence[str | None], where: str, on_missing: str = "error"
    ) -> tuple[list[int], int]:
        """Returns the ids of labels, -1 for None, and how many labels have a skill without a
        cluster. With on_missing="skip" such a label counts as none.

        Raises:
            RLError: with on_missing="error", for such a label; it names `where`.
        """
        ids = {skill: number for number, skill in enumerate(self.skills)}
        unknown = [label for label in labels if label is not None and label not in ids]
        if unknown and on_missing == "error":
            raise RLError(
                f"{where}: skill {unknown[0]!r} has no cluster among the {len(ids)} of the skill "
                f"map ({', '.join(ids)}); discover it, or relabel the spans"
            )
        return [-1 if label is None else ids.get(label, -1) for label in labels], len(unknown)


def load_skill_map(
    path: str | Path,
    num_layers: int,
    num_experts: int,
    moe_router_topk: int | None,
    *,
    exclusive: bool = False,
) -> SkillMap:
    """Reads the map in a file, for a model of these sizes.

    Args:
        moe_router_topk: None: any, where nothing is routed.
        exclusive: whether clusters must be exclusive, with a common one (format 2).
    Raises:
        RLError: in one line, for a file that cannot be read, is no map, or was made for a model of
            other sizes; for format 1 where `exclusive`.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"over {MAX_BYTES} bytes")
        held = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"not JSON ({error})"
        raise RLError(f"skill map {path}: {reason}") from None
    if not isinstance(held, Mapping) or held.get("format") not in (FORMAT, OVERLAPPING):
        found = held.get("format") if isinstance(held, Mapping) else type(held).__name__
        raise RLError(
            f"skill map {path}: format is {str(found)[:80]!r}; this version reads {FORMAT!r}"
        )
    if exclusive and held["format"] != FORMAT:
        raise RLError(
            f"skill map {path}: format is {held['format']!r}, exclusive clusters need {FORMAT!r}; "
            "make it with --method knock-out or random"
        )
    keys = (*SIZES, "skills", *(("common",) if held["format"] == FORMAT else ()))
    missing = [key for key in keys if key not in held]
    if missing:
        raise RLError(f"skill map {path}: {missing[0]!r} is missing; write the map again")
    topk = held["moe_router_topk"]
    if moe_router_topk is None and type(topk) is int and topk >= 1:
        moe_router_topk = topk
    for key, expected in zip(SIZES, (num_layers, num_experts, moe_router_topk), strict=True):
        if type(held[key]) is not int or held[key] != expected:
            raise RLError(
                f"skill map {path}: {key} is {str(held[key])[:80]}, the model's is {expected}; "
                "discover the experts of this model"
            )
    if not isinstance(held["skills"], Mapping):
        raise RLError(f"skill map {path}: 'skills' is no object; write the map again")
    info = held.get("info", {})
    if not isinstance(info, Mapping):
        raise RLError(f"skill map {path}: 'info' is no object; write the map again")
    common = held["common"] if held["format"] == FORMAT else None
    if held["format"] == FORMAT and not isinstance(common, list):
        raise RLError(f"skill map {path}: 'common' is no list; write the map again")
    sizes = num_layers, num_experts, topk
    try:
        return SkillMap(*sizes, dict(held["skills"]), dict(info), common)
    except RLError as error:
        raise RLError(f"skill map {path}: {error}") from None


def save_skill_map(skill_map: SkillMap, path: str | Path) -> None:
    """Writes a map, one line for each skill; the file is whole or not there at all."""
    head: dict[str, Any] = {"format": OVERLAPPING if skill_map.common is None else FORMAT}
    head |= {key: getattr(skill_map, key) for key in SIZES}
    if skill_map.common is not None:
        head["common"] = skill_map.common
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    skills = [f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in skill_map.skills.items()]
    lines += ['  "skills": {', ",\n".join(skills), "  },"]
    lines += [f'  "info": {json.dumps(skill_map.info)}']
    text = "{\n" + "\n".join(lines) + "\n}\n"
    with whole_file(Path(path)) as partial:
        partial.write_text(text, encoding="utf-8")


def shuffled(skill_map: SkillMap, seed: int) -> SkillMap:
    """Returns the control: in each layer the experts of skills change places at random, so that as
    few as possible stay with their skill. The sizes of clusters and of their overlaps stay, and so
    do the common experts: the control differs in which expert serves which skill alone."""
    generator = torch.Generator().manual_seed(seed)
    skills: dict[str, list[list[int]]] = {skill: [] for skill in skill_map.skills}
    for layer in range(skill_map.num_layers):
        common = [] if skill_map.common is None else skill_map.common[layer]
        clusters = [clusters[layer] for clusters in skill_map.skills.values()]
        place = _moved(clusters, sorted({*range(skill_map.num_experts)} - {*common}), generator)
        for skill, cluster in zip(skill_map.skills, clusters, strict=True):
            skills[skill].append(sorted(place[expert] for expert in cluster))
    return replace(skill_map, skills=skills, info=skill_map.info | {"shuffled_with_seed": seed})


def _moved(
    clusters: Sequence[Sequence[int]], experts: Sequence[int], generator: torch.Generator
) -> dict[int, int]:
    """Returns the first of `DRAWS` orders of the experts in which the fewest stay in a cluster."""
    best, fewest = dict(zip(experts, experts, strict=True)), len(experts) * len(clusters) + 1
    for _ in range(DRAWS):
        order = torch.randperm(len(experts), generator=generator).tolist()
        place = {expert: experts[to] for expert, to in zip(experts, order, strict=True)}
        stay = sum(place[expert] in cluster for cluster in clusters for expert in cluster)
        if stay < fewest:
            best, fewest = place, stay
        if not stay:
            break
    return best


def _check_exclusive(skill_map: SkillMap) -> None:
    assert skill_map.common is not None
    named = {"the common cluster": skill_map.common}
    named |= {f"skill {skill!r}": clusters for skill, clusters in skill_map.skills.items()}
    for layer in range(skill_map.num_layers):
        owners: dict[int, str] = {}
        for name, clusters in named.items():
            for expert in clusters[layer]:
                if owners.setdefault(expert, name) is not name:
                    raise RLError(
                        f"layer {layer}: expert {expert} is in {owners[expert]} and in {name}; "
                        "clusters beside a common one share no expert"
                    )


def _check_clusters(skill_map: SkillMap, at: str, clusters: Any) -> None:
    if not isinstance(clusters, list) or not all(isinstance(c, list) for c in clusters):
        raise RLError(f"{at} is no list of layers, each a list of experts; write the map again")
    if len(clusters) != skill_map.num_layers:
        raise RLError(
            f"{at} has {len(clusters)} layers, num_layers is {skill_map.num_layers}; "
            "write one list for each layer"
        )
    for layer, experts in enumerate(clusters):
        for expert in experts:
            if type(expert) is not int or not 0 <= expert < skill_map.num_experts:
                raise RLError(
                    f"{at}, layer {layer}: expert {expert!r} of {skill_map.num_experts}; "
                    f"use 0 to {skill_map.num_experts - 1}"
                )
        if len({*experts}) != len(experts):
            raise RLError(f"{at}, layer {layer}: an expert is named twice; name each once")
    if not any(clusters):
        raise RLError(
            f"{at} has 0 experts in all {skill_map.num_layers} layers; probe more samples of it, "
            "or take it out of the map"
        )

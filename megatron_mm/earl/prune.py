"""Pruning: which experts of each layer a smaller model keeps for some skills, and that model's
checkpoint.

Shapes: L layers, E experts, S skills.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mm.checkpoint.compatible import CARRIED_PREFIX
from megatron_mm.checkpoint.shards import weight_key
from megatron_mm.config import ModelConfig, ParallelConfig
from megatron_mm.convert.chunked import Made, write_checkpoint
from megatron_mm.convert.folder import NOTES
from megatron_mm.convert.to_hf import Checkpoint
from megatron_mm.convert.work import nbytes
from megatron_mm.earl.skill_map import SkillMap
from megatron_mm.errors import ConfigError, RLError
from megatron_mm.model.blueprint import blueprint

# Figures of a map's info that say how much a skill needs each expert, skill -> [L][E]; the first
# that is there counts.
SCORES = ("knock_out", "use")
# Multi-token prediction has experts of its own, which no map knows.
MULTI_TOKEN = "mtp."
LAYER = re.compile(r"language\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Choice:
    """The experts that a pruned model keeps.

    Attributes:
        experts: for each layer, ascending; their order is their order in the pruned model.
        filled_by: the figure of the map's info that decided beside the clusters; None: none did.
    """

    experts: list[list[int]]
    filled_by: str | None

    @property
    def count(self) -> int:
        """The number of experts in every layer."""
        return len(self.experts[0])


def choose(
    skill_map: SkillMap, skills: Sequence[str], keep: int | None, *, clusters: bool = True
) -> Choice:
    """Chooses the experts that serve some skills.

    The experts of the skills' clusters and of the common one come before the others. Among each,
    the higher score comes first: the mean over the skills of a figure of the map's info, each
    skill's over its largest. Equal scores follow the experts' numbers.

    Args:
        keep: experts of every layer; None: as many as the largest of the layers' unions of clusters
            has.
        clusters: False: the figure alone counts, for a model whose routes know no clusters.
    Raises:
        ConfigError: a skill is unknown, or `keep` is less than a token takes or not less than the
            model has.
        RLError: a layer's clusters have more or fewer experts, and nothing says which to take.
    """
    for skill in skills:
        if skill not in skill_map.skills:
            raise ConfigError(f"--skills names {skill!r}; allowed: {', '.join(skill_map.names)}")
    k, experts = skill_map.moe_router_topk, skill_map.num_experts
    bounds = f"{k}, which a token takes, to {experts - 1} of the {experts} experts"
    member_LE = _members(skill_map, skills)
    if not clusters:
        member_LE = torch.zeros_like(member_LE)
    largest = int(member_LE.sum(1).max())
    if keep is None:
        if skill_map.common is None:
            raise ConfigError(
                "--keep is none, and the map is of format 1, which has no cluster for tokens "
                f"without a skill; allowed: {bounds}"
            )
        if not k <= largest < experts:
            raise ConfigError(
                f"--keep is none, and the clusters of {', '.join(skills)} and the common one have "
                f"up to {largest} experts in a layer; allowed: {bounds}"
            )
        keep = largest
    if not k <= keep < experts:
        raise ConfigError(f"--keep is {keep}; allowed: {bounds}")
    short = (member_LE.sum(1) != keep).nonzero().flatten().tolist()
    if not short:
        return Choice([row.nonzero().flatten().tolist() for row in member_LE], None)
    found = next((name for name in SCORES if name in skill_map.info), None)
    if found is None:
        raise RLError(
            f"the clusters of {', '.join(skills)} have {int(member_LE[short[0]].sum())} experts in "
            f"layer {short[0]}, {keep} are to be kept, and the map has neither "
            f"{' nor '.join(map(repr, SCORES))} to choose by; discover it again"
        )
    score_LE = _scores(skill_map, skills, found)
    # A stable sort leaves equal ones in the order of their numbers. Scores are from -1 to 1.
    order_LE = (score_LE + 4.0 * member_LE).argsort(dim=1, descending=True, stable=True)
    return Choice(order_LE[:, :keep].sort(1).values.tolist(), found)


def _members(skill_map: SkillMap, skills: Sequence[str]) -> torch.Tensor:
    """Returns bool [L, E]: in a cluster of the skills, or common."""
    ids = [skill_map.names.index(skill) for skill in skills]
    if skill_map.common is None:
        return skill_map.membership()[ids].any(0)
    return skill_map.clusters()[[*ids, -1]].any(0)


def _scores(skill_map: SkillMap, skills: Sequence[str], name: str) -> torch.Tensor:
    """Returns fp64 [L, E], the mean over skills of a figure, each over its largest."""
    sizes = len(skills), skill_map.num_layers, skill_map.num_experts
    try:
        named = [skill_map.info[name][skill] for skill in skills]
        figure_SLE = torch.tensor(named, dtype=torch.float64)
    except (KeyError, TypeError, ValueError):
        figure_SLE = torch.empty(0)
    if tuple(figure_SLE.shape) != sizes or not figure_SLE.isfinite().all():
        raise RLError(
            f"{name!r} in the map's info lacks the {sizes[1]} layers x {sizes[2]} experts, all "
            f"numbers, of each of {', '.join(skills)}; discover it again"
        )
    largest_S11 = figure_SLE.abs().amax((1, 2), keepdim=True).clamp(min=1e-12)
    return (figure_SLE / largest_S11).mean(0)


def pruned_model(model: ModelConfig, experts: int) -> ModelConfig:
    """Returns the model with so many experts in every layer; a token takes as many as before."""
    return replace(model, language=replace(model.language, num_experts=experts))


@dataclass(frozen=True)
class Part:
    """Unit of work: rows first..last-1 of a stored tensor, of which `rows` are kept (None: all) and
    come from row `place` on; a tensor without rows is a part by itself."""

    key: str
    shape: tuple[int, ...]  # of the whole pruned tensor
    bytes: int
    first: int | None = None
    last: int | None = None
    rows: list[int] | None = None  # from `first`
    place: int = 0

    @property
    def written(self) -> int:
        if self.rows is None or self.first is None or self.last is None:
            return self.bytes
        return self.bytes // (self.last - self.first) * len(self.rows)


def parts(checkpoint: Checkpoint, choice: Choice) -> tuple[list[Part], list[str]]:
    """Returns the units of work, and the names of carried tensors that are left out."""
    smaller = blueprint(pruned_model(checkpoint.model, choice.count))
    found: list[Part] = []
    for name, layout in checkpoint.parameters.items():
        key, shape = weight_key(name), smaller[name].global_shape
        kept = None
        if shape != layout.global_shape:  # experts, and the router's rows for them
            layer = LAYER.match(name)
            assert layer is not None, f"{name} depends on the experts and is of no layer"
            kept = choice.experts[int(layer[1])]
        found += _of_rows(checkpoint, key, shape, kept)
    left_out = [name for name in checkpoint.carried if MULTI_TOKEN in name]
    for name in checkpoint.carried:
        if name not in left_out:
            key = CARRIED_PREFIX + name
            found += _of_rows(checkpoint, key, checkpoint.reader.shape(key), None)
    return found, left_out


def _of_rows(
    checkpoint: Checkpoint, key: str, shape: tuple[int, ...], kept: list[int] | None
) -> list[Part]:
    reader = checkpoint.reader
    size = reader.dtype(key).itemsize
    if not shape:
        return [Part(key, shape, size)]
    found, place = [], 0
    for first, last in reader.ranges(key):
        here = None if kept is None else [row - first for row in kept if first <= row < last]
        rows = last - first if here is None else len(here)
        if rows:
            read = (last - first) * nbytes(shape[1:], size)
            found.append(Part(key, shape, read, first, last, here, place))
        place += rows
    return found


def write_pruned(
    checkpoint: Checkpoint,
    choice: Choice,
    target: Path,
    parallel: ParallelConfig,
    record: dict[str, Any],
    group: dist.ProcessGroup,
    *,
    quiet: bool = False,
) -> tuple[Path, list[str]]:
    """Writes the checkpoint of the pruned model, weights only. Every rank calls it.

    Args:
        parallel: the layout to record.
        record: kept in the checkpoint's `extra`, under "pruned".
        group: gloo group of all ranks.
    Returns:
        the new checkpoint's folder; the names of tensors that are left out.
    Raises:
        CheckpointError: on every rank; partial output is removed.
    """
    work, left_out = parts(checkpoint, choice)

    def make(part: Part) -> Made:
        tensor = checkpoint.reader.read(part.key, part.first, part.last)
        if part.rows is not None:
            tensor = tensor[part.rows]
        return part.key, part.shape, part.place, tensor

    made = write_checkpoint(
        target,
        checkpoint.iteration,
        work,
        make,
        replace(
            checkpoint.run, model=pruned_model(checkpoint.model, choice.count), parallel=parallel
        ),
        {NOTES: checkpoint.notes, "pruned": record},
        checkpoint.assets,
        group,
        doing=f"cannot prune {checkpoint.path} to {target}",
        what="pruning",
        quiet=quiet,
    )
    return made, left_out

"""The map from a teacher's layers and experts to a student's, and its file.

    experts   fp32 [n, E_T, E_S]    of each mapped layer: a row for each of the teacher's experts,
                                    which sums to 1: how its probability is dealt to the student's

The head has `layers`, [student's layer, teacher's layer] of each, and `info`, how it was made.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron_mm.errors import DataError
from megatron_mm.mimic.route_file import RouteFile
from megatron_mm.mimic.side_files import SideFile, write

FORMAT = "megatron_mm expert map 1"
TENSORS = {"experts": (torch.float32, 3)}
SUM_SLACK = 1e-4  # of a row: 512 values in fp32, each off by 6e-8 of itself, and room


@dataclass(frozen=True)
class ExpertMap:
    """A map between two models.

    Attributes:
        identity: of the teacher (`recorded.TeacherSizes`).
        layers: student's layer -> teacher's, ascending.
        experts: student's layer -> A, fp32 [E_T, E_S], rows that sum to 1.
        info: how it was made.
    """

    identity: str
    layers: dict[int, int]
    experts: dict[int, torch.Tensor]
    info: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes the file.

        Raises:
            DataError: it cannot be written.
        """
        head = {
            "format": FORMAT,
            "teacher": self.identity,
            "layers": [[mine, theirs] for mine, theirs in self.layers.items()],
            "info": self.info,
        }
        write(path, head, {"experts": torch.stack([*self.experts.values()]).float()})


def load_expert_map(
    path: str | Path, routes: RouteFile, student_layers: list[int], num_experts: int
) -> ExpertMap:
    """Reads a map.

    Args:
        routes: of the teacher whose routes will be mapped.
        student_layers: the student's layers of experts; num_experts: of each.
    Raises:
        DataError: for a file that cannot be read, of another teacher or student, or with rows that
            are no distributions.
    """
    file = SideFile(path, "expert map", FORMAT, TENSORS)
    pairs, identity = file.head.get("layers"), file.head.get("teacher")
    if identity != routes.teacher.identity:
        raise DataError(
            f"{file.name}: made for the teacher {str(identity)[:40]}, {routes.name} is of "
            f"{routes.teacher.identity[:40]}; map the experts of this teacher"
        )
    layers = _layers(file.name, pairs, routes.layers, student_layers)
    shape = len(layers), routes.teacher.num_experts, num_experts
    if file.shape("experts") != shape:
        raise DataError(
            f"{file.name}: experts has the shape {list(file.shape('experts'))}, its layers, the "
            f"teacher's experts and the student's are {list(shape)}; map the experts of this pair"
        )
    whole = file.read("experts")
    wrong = ~(whole >= 0).all(2) | ~((whole.sum(2) - 1).abs() <= SUM_SLACK)
    if wrong.any():
        number, expert = wrong.nonzero()[0].tolist()
        raise DataError(
            f"{file.name}: layer {list(layers)[number]}, the teacher's expert {expert}: its shares "
            f"sum to {float(whole[number, expert].sum()):g}, not 1; write the map again"
        )
    info = file.head.get("info")
    held = dict(zip(layers, whole, strict=True))
    return ExpertMap(identity, layers, held, info if isinstance(info, dict) else {})


def _layers(
    name: str, pairs: Any, recorded: list[int], student_layers: list[int]
) -> dict[int, int]:
    whole = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair)
        for pair in pairs
    )
    if not whole or not pairs or len({mine for mine, _ in pairs}) < len(pairs):
        raise DataError(f"{name}: layers is no list of pairs of layers; write the map again")
    for mine, theirs in pairs:
        if mine not in student_layers:
            raise DataError(
                f"{name}: layer {mine} of the student is none of its layers of experts "
                f"({_some(student_layers)}); map the experts of this student"
            )
        if theirs not in recorded:
            raise DataError(
                f"{name}: layer {mine} listens to the teacher's layer {theirs}, recorded are "
                f"{_some(recorded)}; record with this layer, or map again"
            )
    return {mine: theirs for mine, theirs in pairs}


def _some(layers: list[int]) -> str:
    text = ", ".join(map(str, layers[:12]))
    return text + (", ..." if len(layers) > 12 else "")


def permuted(mapped: ExpertMap, seed: int) -> ExpertMap:
    """Returns the control: in each layer the student's experts change places at random, and none
    keeps its own. To how many each of the teacher's experts is dealt, and how evenly, stays as it
    is; which they are does not."""
    generator = torch.Generator().manual_seed(seed)
    experts = {}
    for index, a_TS in mapped.experts.items():
        order = torch.randperm(a_TS.shape[1], generator=generator)
        others = torch.empty_like(order)
        others[order] = order.roll(-1)  # one circle
        experts[index] = a_TS[:, others]
    return replace(mapped, experts=experts, info=mapped.info | {"permuted_with_seed": seed})

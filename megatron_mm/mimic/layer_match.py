"""Layers of a student that stand for a teacher's, by linear CKA of router probabilities.

    CKA(X, Y) = |X^T Y|^2 / (|X^T X| |Y^T Y|)       Frobenius norms, columns less their means

(Kornblith et al. 2019, arXiv 1905.00414, equation for linear kernels). The products are of the size
of experts and are sums over positions, so they add over ranks and microbatches.

Shapes: n positions, L_T and L_S layers, E_T and E_S experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass
class CrossSums:
    """Sums over positions, fp64.

    Attributes:
        count: [1], n.
        teacher_LE, student_LE: sums of probabilities.
        teacher_LEE, student_LEE: sums of products within a layer.
        cross_STEE: [L_S, L_T, E_T, E_S], sums of products between layers.
    """

    count: torch.Tensor
    teacher_LE: torch.Tensor
    student_LE: torch.Tensor
    teacher_LEE: torch.Tensor
    student_LEE: torch.Tensor
    cross_STEE: torch.Tensor

    @classmethod
    def zeros(cls, teacher: tuple[int, int], student: tuple[int, int]) -> CrossSums:
        """Returns sums over no positions of (layers, experts) of both."""
        (lt, et), (ls, es) = teacher, student
        shapes = ((1,), (lt, et), (ls, es), (lt, et, et), (ls, es, es), (ls, lt, et, es))
        return cls(*(torch.zeros(*shape, dtype=torch.float64) for shape in shapes))

    @property
    def parts(self) -> list[torch.Tensor]:
        """All sums, to be added up over ranks in place."""
        return [*vars(self).values()]

    def add_teacher(self, probabilities_nTE: list[torch.Tensor]) -> None:
        """Adds positions, with the probabilities of each of the teacher's layers."""
        self.count += len(probabilities_nTE[0])
        for number, p_nE in enumerate(probabilities_nTE):
            p_nE = p_nE.double()
            self.teacher_LE[number] += p_nE.sum(0)
            self.teacher_LEE[number] += p_nE.T @ p_nE

    def add_student(
        self, number: int, own_nE: torch.Tensor, probabilities_nTE: list[torch.Tensor]
    ) -> None:
        """Adds the student's probabilities of one layer at positions, beside the teacher's."""
        own_nE = own_nE.double()
        self.student_LE[number] += own_nE.sum(0)
        self.student_LEE[number] += own_nE.T @ own_nE
        for other, p_nE in enumerate(probabilities_nTE):
            self.cross_STEE[number, other] += p_nE.double().T @ own_nE

    def cka(self) -> torch.Tensor:
        """Returns fp64 [L_S, L_T]; 0 where a router's probabilities never change."""
        n = self.count.clamp(min=1)
        teacher_L = _norms(self.teacher_LEE, self.teacher_LE, n)
        student_L = _norms(self.student_LEE, self.student_LE, n)
        means = torch.einsum("ta,sb->stab", self.teacher_LE, self.student_LE) / n
        cross_ST = (self.cross_STEE - means).square().sum((2, 3))
        scale_ST = student_L[:, None] * teacher_L
        return torch.where(scale_ST > 0, cross_ST / scale_ST, 0.0)


def _norms(products_LEE: torch.Tensor, sums_LE: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    means = torch.einsum("la,lb->lab", sums_LE, sums_LE) / n
    return (products_LEE - means).square().sum((1, 2)).sqrt()


def monotone_matching(score_ST: torch.Tensor) -> list[int]:
    """Returns for each of the student's layers, in order, the number of the teacher's layer that it
    listens to: the choice with the greatest sum of scores in which no later layer listens to an
    earlier one, nor two to the same where the teacher has enough. By dynamic programming."""
    mine, theirs = score_ST.shape
    apart = int(theirs >= mine)
    best = score_ST[0].clone()
    came: list[torch.Tensor] = []
    for row in score_ST[1:]:
        top, where = best.cummax(0)  # of the layers up to each
        if apart:  # up to the one before
            top = torch.cat((top.new_full((1,), -torch.inf), top[:-1]))
            where = torch.cat((where.new_zeros(1), where[:-1]))
        came.append(where)
        best = row + top
    chosen = [int(best.argmax())]
    for where in reversed(came):
        chosen.append(int(where[chosen[-1]]))
    return chosen[::-1]


def by_depth(mine: int, theirs: int, recorded: Sequence[int]) -> list[int]:
    """Returns for each of `mine` layers the one of `recorded` that is nearest to the same share of
    the depth of `theirs`, as its place in that list."""
    depths = [number / (mine - 1) if mine > 1 else 1.0 for number in range(mine)]
    return [
        min(range(len(recorded)), key=lambda n: abs(recorded[n] - depth * (theirs - 1)))
        for depth in depths
    ]

"""Ways to deal a teacher's experts to a student's: A [E_T, E_S], rows that sum to 1.

Shapes: E_T and E_S experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import one_hot

EPSILON = 0.05  # of the transport's entropy, in units of its cost
PRIOR = 1e-9  # of a joint probability, so that its logarithm exists
ROUNDS, GOOD = 10_000, 1e-9  # of Sinkhorn, and how far marginals may be off
# Most steps between sets, and what one must gain: rounding would change places for ever.
STEPS, LEAST_GAIN = 10_000, 1e-12


def transport(joint_TS: torch.Tensor, epsilon: float = EPSILON) -> torch.Tensor:
    """Returns fp64 [E_T, E_S], the plan that moves the teacher's load onto the student's and pays
    minus the pointwise mutual information of both, with an entropy of weight `epsilon` (Sinkhorn;
    Cuturi 2013, arXiv 1306.0895). Its rows sum to the teacher's load, its columns to the student's.

    Args:
        joint_TS: sums over positions of p_T(a) p_S(b).
    """
    joint_TS = joint_TS.double() / joint_TS.sum()
    joint_TS = (joint_TS + PRIOR) / (joint_TS + PRIOR).sum()
    load_T, load_S = joint_TS.sum(1), joint_TS.sum(0)
    kernel_TS = (joint_TS.log() - load_T.log()[:, None] - load_S.log()) / epsilon
    u_T, v_S = torch.zeros_like(load_T), torch.zeros_like(load_S)
    for _ in range(ROUNDS):
        v_S = load_S.log() - (kernel_TS + u_T[:, None]).logsumexp(0)
        u_T = load_T.log() - (kernel_TS + v_S).logsumexp(1)
        plan_TS = (kernel_TS + u_T[:, None] + v_S).exp()
        if (plan_TS.sum(0) - load_S).abs().max() <= GOOD:
            break
    return plan_TS


def by_transport(joint_TS: torch.Tensor) -> torch.Tensor:
    """Returns A: each row of the plan as shares."""
    plan_TS = transport(joint_TS)
    return plan_TS / plan_TS.sum(1, keepdim=True)


def by_clusters(together_TT: torch.Tensor, student: int) -> torch.Tensor:
    """Returns A for a student whose experts mean nothing yet: the teacher's experts are grouped
    into as many sets, of sizes that differ by one at most, so that experts of a set are chosen
    together; set b is the student's expert b. Where the student has more, each of the teacher's has
    its own set of the student's.

    Args:
        together_TT: sums over positions of p_T(a) p_T(a').
    """
    teacher = len(together_TT)
    if teacher <= student:
        mine = torch.arange(student) * teacher // student  # whose each of the student's is
        member_TS = mine == torch.arange(teacher)[:, None]
        return member_TS.double() / member_TS.sum(1, keepdim=True)
    set_T = balanced_sets(together_TT, student)
    return (set_T[:, None] == torch.arange(student)).double()


def balanced_sets(together_TT: torch.Tensor, count: int) -> torch.Tensor:
    """Returns int64 [E_T], the set of each expert, of `count` sets whose sizes differ by one at
    most. Experts are ordered along the second eigenvector of their affinities' Laplacian and cut;
    then the step is taken that gains most affinity within sets, until none gains: two experts
    change places, or one goes to a set that is smaller than its own."""
    load_T = together_TT.diagonal().double().clamp(min=1e-30).sqrt()
    affinity_TT = together_TT.double() / (load_T[:, None] * load_T)
    affinity_TT = (affinity_TT + affinity_TT.T) / 2
    affinity_TT.fill_diagonal_(0.0)
    laplacian_TT = affinity_TT.sum(1).diag() - affinity_TT
    order = torch.linalg.eigh(laplacian_TT).eigenvectors[:, 1].argsort()
    experts = len(order)
    set_T = torch.empty(experts, dtype=torch.int64)
    set_T[order] = torch.arange(experts) * count // experts
    for _ in range(STEPS):
        member_TC = one_hot(set_T, count).double()
        pull_TC = affinity_TT @ member_TC  # of each set on each expert
        own_T = pull_TC.gather(1, set_T[:, None]).squeeze(1)
        to_TT = pull_TC[:, set_T] - own_T[:, None]  # what a gains in b's set
        gain_TT = to_TT + to_TT.T - 2 * affinity_TT
        gain_TT[set_T[:, None] == set_T] = 0.0
        size_C = member_TC.sum(0)
        gain_TC = torch.where(size_C < size_C[set_T][:, None], pull_TC - own_T[:, None], 0.0)
        if max(gain_TT.max(), gain_TC.max()) <= LEAST_GAIN:
            break
        if gain_TT.max() >= gain_TC.max():
            a, b = divmod(int(gain_TT.argmax()), experts)
            set_T[[a, b]] = set_T[[b, a]]
        else:
            a, c = divmod(int(gain_TC.argmax()), count)
            set_T[a] = c
    return set_T


def by_skills(
    teacher: Mapping[str, Sequence[int]],
    student: Mapping[str, Sequence[int]],
    experts: tuple[int, int],
) -> torch.Tensor:
    """Returns A of one layer through the clusters of two skill maps: an expert of the teacher is
    dealt evenly to its skills, and in each evenly to the student's experts of the skill; one that
    serves no skill the student has experts for is dealt to all.

    Args:
        teacher, student: skill -> experts; the common cluster counts as one.
        experts: numbers of the teacher's and of the student's.
    """
    a_TS = torch.zeros(*experts, dtype=torch.float64)
    for skill, theirs in teacher.items():
        mine = list(student.get(skill, ()))
        for expert in theirs if mine else ():
            a_TS[expert, mine] += 1 / len(mine)
    a_TS[a_TS.sum(1) == 0] = 1.0
    return a_TS / a_TS.sum(1, keepdim=True)

"""Layers by CKA, experts by transport, sets and skills: on what is known."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
import torch

from megatron_mm.mimic.expert_match import (
    balanced_sets,
    by_clusters,
    by_skills,
    by_transport,
    transport,
)
from megatron_mm.mimic.layer_match import CrossSums, by_depth, monotone_matching


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- layers ----


def test_cka_equals_its_definition_and_adds_up():
    """In two parts, as two ranks count them; against centred matrices of all positions."""
    teacher = [rand(50, 6, seed=n).softmax(1) for n in range(3)]
    student = [rand(50, 4, seed=9 + n).softmax(1) for n in range(2)]
    parts = []
    for here in (slice(0, 20), slice(20, 50)):
        sums = CrossSums.zeros((3, 6), (2, 4))
        sums.add_teacher([p[here] for p in teacher])
        for number, own in enumerate(student):
            sums.add_student(number, own[here], [p[here] for p in teacher])
        parts.append(sums)
    whole = CrossSums(*(a + b for a, b in zip(parts[0].parts, parts[1].parts, strict=True)))
    found = whole.cka()
    for s, own in enumerate(student):
        for t, p in enumerate(teacher):
            x, y = p - p.mean(0), own - own.mean(0)
            cross = (x.T @ y).norm() ** 2
            expected = cross / ((x.T @ x).norm() * (y.T @ y).norm())
            assert float(found[s, t]) == pytest.approx(float(expected), rel=1e-9)
    same = CrossSums.zeros((1, 4), (1, 4))
    same.add_teacher(student[:1])
    same.add_student(0, student[0], student[:1])
    assert float(same.cka()) == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize(("mine", "theirs"), [(1, 1), (1, 4), (3, 3), (3, 5), (4, 2), (2, 6)])
def test_the_best_monotone_matching(mine, theirs):
    """Against all of them."""
    for seed in range(20):
        score = rand(mine, theirs, seed=seed)
        allowed = [
            c
            for c in combinations_with_replacement(range(theirs), mine)
            if theirs < mine or len({*c}) == mine
        ]
        best = max(allowed, key=lambda c: sum(float(score[i, j]) for i, j in enumerate(c)))
        assert monotone_matching(score) == list(best)


def test_layers_by_depth():
    assert by_depth(4, 6, range(6)) == [0, 2, 3, 5] and by_depth(3, 3, range(3)) == [0, 1, 2]
    assert by_depth(1, 5, range(5)) == [4] and by_depth(5, 2, range(2)) == [0, 0, 0, 1, 1]
    # Of three recorded layers of 48: each for those that are nearest in depth.
    chosen = by_depth(48, 48, [8, 16, 24])
    assert [chosen.index(n) for n in range(3)] == [0, 13, 21] and chosen[24:] == [2] * 24


# ---- experts ----


def test_the_transport_has_both_loads():
    joint = rand(8, 5) ** 4
    plan = transport(joint)
    joint = joint / joint.sum()
    # Sinkhorn's own bound, and the prior that keeps logarithms finite.
    torch.testing.assert_close(plan.sum(1), joint.sum(1), rtol=0, atol=1e-7)
    torch.testing.assert_close(plan.sum(0), joint.sum(0), rtol=0, atol=1e-7)
    shares = by_transport(joint)
    torch.testing.assert_close(shares.sum(1), torch.ones(8, dtype=torch.float64))


def test_the_transport_finds_a_permutation():
    """Tokens of which both models choose the same expert, under other names; a fifth is noise."""
    places = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    joint = 0.2 * torch.ones(6, 6, dtype=torch.float64) / 36
    joint[torch.arange(6), places] += 0.8 / 6
    assert torch.equal(by_transport(joint).argmax(1), places)
    assert by_transport(joint).amax(1).min() > 0.99


@pytest.mark.parametrize(("experts", "count"), [(16, 8), (12, 4), (10, 4)])
def test_sets_are_balanced_and_found(experts, count):
    """Experts of a set are chosen together, in an order that hides it."""
    generator = torch.Generator().manual_seed(3)
    true = torch.randperm(experts, generator=generator) * count // experts
    together = 0.1 * rand(experts, experts) + (true[:, None] == true)
    found = balanced_sets(together + together.T, count)
    sizes = found.bincount(minlength=count)
    assert sizes.max() - sizes.min() <= 1
    assert torch.equal(found[:, None] == found, true[:, None] == true)
    shares = by_clusters(together + together.T, count)
    assert torch.equal(shares.sum(1), torch.ones(experts, dtype=torch.float64))
    assert torch.equal(shares.argmax(1), found)


def test_a_student_with_more_experts_has_sets_of_them():
    shares = by_clusters(torch.eye(4), 10)
    torch.testing.assert_close(shares.sum(1), torch.ones(4, dtype=torch.float64))
    held = (shares > 0).sum(1)
    assert held.max() - held.min() <= 1 and ((shares > 0).sum(0) == 1).all()
    assert torch.equal(by_clusters(torch.eye(4), 4), torch.eye(4, dtype=torch.float64))


def test_experts_by_skills():
    teacher = {"ocr": [0, 1], "count": [1], "hop": [3], "": [4]}
    student = {"ocr": [2], "count": [0, 1], "": [3]}
    shares = by_skills(teacher, student, (5, 4))
    expected = [
        [0, 0, 1, 0],  # ocr
        [0.25, 0.25, 0.5, 0],  # ocr and count
        [0.25] * 4,  # serves nothing
        [0.25] * 4,  # a skill that the student has no experts for
        [0, 0, 0, 1],  # common
    ]
    torch.testing.assert_close(shares, torch.tensor(expected, dtype=torch.float64))

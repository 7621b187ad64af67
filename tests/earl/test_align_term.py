"""The alignment term's weights: by hand, and as a slow loop over positions and layers."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_mm.data.batch import Microbatch
from megatron_mm.earl.align_term import StepCounts, aligned_batch, balance, running_mass
from megatron_mm.earl.router_term import router_term
from megatron_mm.report.metrics import Metrics

S, L, E = 3, 2, 6


def fp64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_rare_skills_weigh_as_much_as_frequent_ones():
    """Two steps, with 30, 10 and 0, then 0, 10 and 2 positions of the skills."""
    mass = running_mass(torch.zeros(3, dtype=torch.float64), torch.tensor([30, 10, 0]))
    assert mass.tolist() == [30, 10, 0]
    assert balance(mass).tolist() == [20 / 30, 20 / 10, 1]  # the mean of those seen is 20
    mass = running_mass(mass, torch.tensor([0, 10, 2]))
    assert mass.tolist() == [0.95 * 30, 0.95 * 10 + 10, 2]
    mean = (28.5 + 19.5 + 2) / 3
    assert balance(mass).tolist() == pytest.approx([mean / 28.5, mean / 19.5, mean / 2], rel=1e-15)
    # Never more than 20 times.
    assert balance(fp64(1000, 1)).tolist() == [500.5 / 1000, 20]
    assert balance(fp64(0, 0)).tolist() == [1, 1]  # nothing was seen yet


def labelled(skills: list[int], supervised: int, pad_multiple: int = 1) -> Microbatch:
    count = len(skills)
    mask = torch.zeros(count)
    mask[:supervised] = 1.0
    return Microbatch.build(
        torch.arange(count),
        [count],
        loss_mask_T=mask,
        skill_T=torch.tensor(skills, dtype=torch.int64),
        pad_multiple=pad_multiple,
    )


# Padding behind the first; skill 2 is not there; 10 supervised tokens.
BATCHES = [labelled([0, 0, 1, -1, -1], 4, pad_multiple=4), labelled([-1, 0, -1, -1, 0, 0], 6)]
CLUSTERS = [[{2, 3}, {2}], [{4}, set()], [{5}, {3}], [{0, 1}, {0, 1, 5}]]  # the common one last
MASS = fp64(8, 2, 5)


def clusters() -> torch.Tensor:
    member_SLE = torch.zeros(S + 1, L, E, dtype=torch.bool)
    for s, layers in enumerate(CLUSTERS):
        for layer, experts in enumerate(layers):
            member_SLE[s, layer, [*experts]] = True
    return member_SLE


def test_a_step_is_counted_without_its_padding():
    counts = StepCounts.read(sum(StepCounts.of([batch], S) for batch in BATCHES))
    assert counts.labelled_S.tolist() == [5, 1, 0]
    assert (counts.others, counts.supervised) == (5, 10)
    assert StepCounts.of(BATCHES, S).tolist() == [5, 1, 0, 5, 10]
    assert StepCounts.of([], S).tolist() == [0] * (S + 2)


def test_the_term_equals_its_equation():
    counts = StepCounts.read(StepCounts.of(BATCHES, S))
    generator = torch.Generator().manual_seed(0)
    total, metrics, found, masses = 0.0, Metrics(), 0.0, []
    mean = (8 + 2 + 5) / 3
    sums, pairs = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for batch in BATCHES:
        length = len(batch.tokens_T)
        logits_LTE = torch.randn(L, length, E, generator=generator)
        taught = aligned_batch(batch, counts, MASS, clusters(), 0.4)
        for layer in range(L):
            # In two parts, as two ranks hold them.
            for here in (range(3), range(3, length)):
                logits_tE = logits_LTE[layer, here.start : here.stop]
                found += float(router_term(logits_tE, taught, layer, here, metrics))
            for t in range(batch.num_real_tokens):
                s = int(batch.skill_T[t])
                cluster = CLUSTERS[s][layer]
                if not cluster:
                    continue
                e = [math.exp(x) for x in logits_LTE[layer, t].tolist()]
                mass = sum(e[i] for i in cluster) / sum(e)
                b = 1.0 if s < 0 else mean / [8, 2, 5][s]
                sums[s >= 0] -= b * math.log(mass)
                pairs[s >= 0] += 1
                masses += [mass] if s >= 0 else []
    assert pairs == {True: 5 * 2 + 1, False: 5 * 2}
    total = 0.4 * (sums[True] / pairs[True] + sums[False] / pairs[False])
    # What the term is divided by at the end. fp32: 44 terms of rounding 6e-8.
    assert found / 10 == pytest.approx(total, rel=1e-6)
    value, weight = metrics.pair("moe/cluster_mass").tolist()
    assert weight == len(masses) == 11
    assert value / weight == pytest.approx(sum(masses) / len(masses), rel=1e-6)


@pytest.mark.parametrize("skills", [[-1, -1], [0, 0]])
def test_a_step_without_labels_or_with_nothing_else_has_the_other_part(skills):
    batch = labelled(skills, 2)
    counts = StepCounts.read(StepCounts.of([batch], S))
    taught = aligned_batch(batch, counts, MASS, clusters(), 0.4)
    term = sum(
        float(router_term(torch.zeros(2, E), taught, n, range(2), Metrics())) for n in range(L)
    )
    # All experts are alike: clusters of 2 and 3, or of 2 and 1, of 6.
    expected = math.log(6 / 2) + (math.log(6 / 3) if skills[0] < 0 else math.log(6 / 1))
    b = 1 if skills[0] < 0 else 5 / 8
    assert term / 2 == pytest.approx(0.4 * b * expected / 2, rel=1e-6)


def test_all_that_it_needs_moves_with_the_batch():
    counts = StepCounts.read(StepCounts.of(BATCHES, S))
    moved = aligned_batch(BATCHES[0], counts, MASS, clusters(), 0.4).to("meta")
    assert (
        moved.skill_T.is_meta and moved.router.weight_T.is_meta and moved.router.cluster_SLE.is_meta
    )

"""Numbers that anyone adds to a step, and what becomes of them."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_mm.report.metrics import DIVISOR, MUTED, Metrics, own_totals, reduced


def step(*ranks: list[Metrics]) -> dict[str, float]:
    """The metrics of a step from the microbatches of every rank."""
    return reduced([own_totals(parts)[0] for parts in ranks])


def test_every_kind_over_microbatches_and_ranks():
    first, second, other = Metrics(), Metrics(), Metrics()
    first.mean("moe/a", torch.tensor(2.0), weight=3)
    second.mean("moe/a", 6.0)
    other.ratio("moe/a", torch.tensor(8.0, dtype=torch.float64), torch.tensor(4))
    for metrics, value in ((first, 1), (second, torch.tensor(5)), (other, 3.0)):
        metrics.sum("train/b", value)
        metrics.max("moe/c", value)
    other.sum("only/there", 7)  # a stage that has nothing adds nothing
    found = step([first, second], [other])
    assert found == {"moe/a": (6 + 6 + 8) / 8, "train/b": 9.0, "moe/c": 5.0, "only/there": 7.0}


def test_a_mean_of_nothing_is_zero_and_the_same_value_twice_is_one():
    metrics, same = Metrics(), Metrics()
    metrics.ratio("kl", 0.0, torch.tensor(0))
    for place in (metrics, same):  # as tensor-parallel ranks would
        place.mean("moe/a", 0.7, weight=5)
    assert step([metrics], [same]) == {"kl": 0.0, "moe/a": pytest.approx(0.7, rel=1e-15)}


def test_a_term_is_divided_by_what_the_loss_is_divided_by():
    last, router = Metrics(), Metrics()
    last.for_objective().ratio("train/lm_loss", 12.0, 6)
    last.for_objective().sum(DIVISOR, torch.tensor(6))
    router.loss_term("moe/router_loss", torch.tensor(1.5))
    router.loss_term("moe/router_loss", torch.tensor(1.5))
    assert step([router], [last]) == {"moe/router_loss": 0.5, "train/lm_loss": 2.0}


def test_only_what_an_objective_adds_must_be_finite():
    fine, bad = Metrics(), Metrics()
    fine.mean("moe/diagnostic", math.nan)
    bad.mean("moe/diagnostic", torch.tensor(math.inf))
    totals, problem = own_totals([fine, bad])
    assert problem is None and math.isnan(totals["moe/diagnostic"].value)
    bad.for_objective().ratio("train/lm_loss", torch.tensor(math.nan), 1)
    _, problem = own_totals([fine, bad])
    assert (problem.name, problem.part) == ("train/lm_loss", 1) and math.isnan(problem.value)


def test_numbers_keep_no_graph_and_the_muted_keep_none():
    weight = torch.ones(2, requires_grad=True)
    metrics = Metrics()
    metrics.mean("moe/a", (weight * 2).sum())
    (entry,) = metrics.entries
    assert not entry.value.requires_grad
    assert metrics.pair("moe/a").tolist() == [4.0, 1.0] and not metrics.pair("moe/b").any()
    MUTED.mean("moe/a", 1.0)
    MUTED.for_objective().sum("moe/b", 1.0)
    assert not MUTED.entries


def test_a_name_has_one_kind():
    metrics, other = Metrics(), Metrics()
    metrics.sum("moe/a", 1.0)
    other.mean("moe/a", 1.0)
    for ranks in ([[metrics, other]], [[metrics], [other]]):
        with pytest.raises(ValueError, match="metric moe/a is a sum and a mean; use two names"):
            step(*ranks)

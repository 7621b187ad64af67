"""Experts in scope: gradients are those of autograd with constants, on every layout."""

from __future__ import annotations

import pytest
import torch

from support.invariance import BROKEN, LAYOUTS, RECOMPUTE, compare, invariance_run, worst
from support.layouts import parallel_config, step_gradients
from support.scopes import (
    clusters_of,
    scope_experts,
    scope_slowly,
    with_skills,
    with_skills_and_routes,
)

NAMES = ["TP2", "TP2 with expert-TP2", "PP2", "EP2", "CP2", "PP2xVPP2", "TP2xPP2xEP2"]


def step(ranks, size, sizes, scope, multiple=None, make=with_skills, **training):
    arguments = invariance_run(**training), parallel_config(**sizes), scope, multiple, make
    return ranks(size, step_gradients, *arguments)[0]


@pytest.fixture(scope="module")
def reference(ranks):
    """By the multiple that streams are padded to: with constants, written slowly."""
    return {multiple: step(ranks, 1, {}, scope_slowly, multiple) for multiple in (1, 2)}


def experts_of(gradients: dict) -> dict[str, tuple[int, torch.Tensor]]:
    """name -> (layer, gradient [E, ...])"""
    names = sorted(name for name in gradients if ".experts." in name)
    layers = sorted({int(name.split("layers.")[1].split(".")[0]) for name in names})
    number = {layer: index for index, layer in enumerate(layers)}
    return {
        name: (number[int(name.split("layers.")[1].split(".")[0])], gradients[name])
        for name in names
    }


def assert_nothing_outside(gradients: dict) -> None:
    inside_LE = clusters_of(invariance_run()).any(0)
    found = experts_of(gradients)
    assert len(found) == 2 * len(inside_LE)
    for name, (layer, gradient) in found.items():
        moved = gradient.flatten(1).abs().amax(1) > 0
        assert not moved[~inside_LE[layer]].any(), name
        assert moved[inside_LE[layer]].any(), name
    assert not inside_LE.all(1).any()  # each layer has an expert that must not move


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_masked_autograd(ranks, reference, name):
    size, sizes = LAYOUTS[name]
    found = step(ranks, size, sizes, scope_experts)
    compare(found, reference[sizes.get("tp", 1) * sizes.get("cp", 1)])
    assert_nothing_outside(found[1])


def test_on_one_rank_and_without_a_scope(ranks, reference):
    """The scope changes no bit but those of the experts, and these by far more than rounding."""
    scoped, plain = (step(ranks, 1, {}, scope, 1) for scope in (scope_experts, None))
    compare(scoped, reference[1])
    assert_nothing_outside(scoped[1])
    assert scoped[0] == plain[0]
    experts = experts_of(plain[1]).keys()
    others = plain[1].keys() - experts
    assert others and all(torch.equal(scoped[1][name], plain[1][name]) for name in others)
    for name in experts:
        assert worst({name: scoped[1][name]}, {name: plain[1][name]})[0] > BROKEN


@pytest.mark.parametrize("name", ["EP2", "TP2"])
def test_inputs_have_the_gradients_of_a_step_without_scope(ranks, name):
    """To the bit, through the dispatcher."""
    size, sizes = LAYOUTS[name]
    scoped, plain = (step(ranks, size, sizes, scope) for scope in (scope_experts, None))
    assert scoped[0] == plain[0]
    others = plain[1].keys() - experts_of(plain[1]).keys()
    assert all(torch.equal(scoped[1][name], plain[1][name]) for name in others)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recompute_changes_no_bit_on_one_rank(ranks, recompute):
    plain, again = (
        step(ranks, 1, {}, scope_experts, 1, **RECOMPUTE.get(r, {})) for r in ("none", recompute)
    )
    assert all(torch.equal(again[1][name], value) for name, value in plain[1].items())


@pytest.mark.parametrize("recompute", ["full", "all modules"])
def test_recomputed_through_the_dispatcher(ranks, reference, recompute):
    found = step(ranks, 2, LAYOUTS["EP2"][1], scope_experts, **RECOMPUTE[recompute])
    compare(found, reference[1])
    assert_nothing_outside(found[1])


def test_replayed_routes(ranks):
    expected = step(ranks, 1, {}, scope_slowly, make=with_skills_and_routes)
    found = step(ranks, 2, LAYOUTS["EP2"][1], scope_experts, make=with_skills_and_routes)
    compare(found, expected)
    assert_nothing_outside(found[1])
    assert worst(found[1], step(ranks, 1, {}, scope_slowly)[1])[0] > BROKEN

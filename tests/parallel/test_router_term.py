"""The routers' own loss: one gradient on every layout, and the one that autograd gives."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megatron_mm.config import RunConfig, num_layers
from megatron_mm.earl.router_term import cluster_log_mass
from megatron_mm.engine.engine import Engine
from megatron_mm.model.layers.moe import Router
from megatron_mm.parallel import groups
from megatron_mm.parallel.param_layout import layouts
from megatron_mm.report.metrics import MUTED
from megatron_mm.train.sft import SupervisedFineTuning
from support.invariance import BROKEN, LAYOUTS, RECOMPUTE, compare, invariance_run, worst
from support.layouts import parallel_config, step_gradients, steps_batches
from support.weights import move_looks_off_zero

SKILLS = 3

# As in support/invariance.py, of smaller gradients: 1.1e-5 seen (dt_bias), 1e-2 if something is
# lost.
TOLERANCE = 3e-5


class PullsRouters(SupervisedFineTuning):
    """The next token, and EARL's term: the supervised token's value says which skill it has."""

    def __init__(self, run: RunConfig, scale: float = 0.7):
        layers, experts = num_layers(run.model.hybrid_layer_pattern), run.model.language.num_experts
        generator = torch.Generator().manual_seed(2)
        self.member_SLE = torch.rand(SKILLS, layers, experts, generator=generator) < 0.4
        self.member_SLE[1, 2] = False  # a skill without experts in a layer
        self.scale = scale

    def router_term(self, logits_tE, batch, moe_index, positions, metrics):
        if moe_index == 1:
            return None
        here = slice(positions.start, positions.stop)
        labels, mask = batch.labels_T[here], batch.loss_mask_T[here]
        skill = torch.where(mask > 0, labels % SKILLS, -1)
        weights = (labels % 7).to(logits_tE.dtype) / 7
        mass = cluster_log_mass(logits_tE, skill, self.member_SLE[:, moe_index])
        return -self.scale * (weights * (skill >= 0) * mass).sum()


def step(ranks, size, sizes, multiple=None, objective=True, **training):
    run = invariance_run(**training)
    objective = PullsRouters(run) if objective else None
    arguments = (run, parallel_config(**sizes), None, multiple, steps_batches, objective)
    return ranks(size, step_gradients, *arguments)[0]


@pytest.fixture(scope="module")
def reference(ranks):
    return {multiple: step(ranks, 1, {}, multiple) for multiple in (1, 2)}


@pytest.mark.parametrize("name", ["TP2", "PP2", "EP2", "CP2", "PP2xVPP2", "TP2xPP2xEP2"])
@pytest.mark.parametrize("recompute", ["none", "full", "all modules"])
def test_gradients_do_not_depend_on_the_layout(ranks, reference, name, recompute):
    size, sizes = LAYOUTS[name]
    found = step(ranks, size, sizes, **RECOMPUTE.get(recompute, {}))
    compare(found, reference[sizes.get("tp", 1) * sizes.get("cp", 1)], TOLERANCE)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recompute_changes_no_bit_on_one_rank(ranks, reference, recompute):
    loss, gradients = step(ranks, 1, {}, 1, **RECOMPUTE[recompute])
    assert loss == reference[1][0]
    assert all(torch.equal(gradients[name], reference[1][1][name]) for name in gradients)


def test_a_step_without_the_term_is_another(ranks, reference):
    """So that the tests above can fail."""
    loss, gradients = step(ranks, 1, {}, 1, objective=False)
    assert loss == reference[1][0]  # it is no part of the main loss
    assert worst(gradients, reference[1][1])[0] > BROKEN


def _noting(router: Router, seen: dict, hidden: torch.Tensor) -> torch.Tensor:
    seen[router.layer_number - 1] = logits = type(router).gating(router, hidden)
    return logits


def both_ways(run: RunConfig):
    """(gradients of an engine's step, those of one sum by autograd, values added to the metrics by
    microbatch, values by layer)"""
    run.model.language.moe_aux_loss_coeff = 0.0
    engine = Engine.create(run, groups.build(run.parallel))
    move_looks_off_zero(engine)
    batches, objective = steps_batches(run, 1)[:2], PullsRouters(run)
    params = {name: param for name, param, _ in layouts(*engine.chunks)}
    parts = engine.forward_backward(batches, objective)
    ours = {name: param.main_grad.clone() for name, param in params.items()}
    engine.models[0].zero_grad_buffer()
    routers = [m for m in engine.chunks[0].modules() if isinstance(m, Router)]
    total, count, direct = torch.zeros(()), 0, torch.zeros(len(routers))
    for batch in batches:
        seen: dict = {}
        for router in routers:
            router.gating = partial(_noting, router, seen)
        positions = torch.arange(len(batch.tokens_T))
        loss, tokens = objective.loss(
            engine.chunks[0](batch), batch, positions, engine.groups.pg, MUTED
        )
        total, count = total + loss, count + int(tokens)
        for index, logits in seen.items():
            here = range(len(positions))
            term = objective.router_term(logits.flatten(0, 1), batch, index, here, MUTED)
            if term is not None:
                total, direct[index] = total + term, direct[index] + term.detach()
    total.backward()
    theirs = {name: param.main_grad / count for name, param in params.items()}
    noted = [
        [float(entry.value) for entry in metrics.entries if entry.name == "moe/router_loss"]
        for metrics in parts
    ]
    return ours, theirs, noted, direct.tolist()


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_it_is_the_gradient_of_the_sum(ranks, recompute):
    run = invariance_run(**RECOMPUTE.get(recompute, {}))
    run.parallel = parallel_config()
    ours, theirs, noted, direct = ranks(1, both_ways, run)[0]
    # The same operations but for the order in which gradients meet: some 1e-7 each.
    error, name = worst(ours, theirs)
    assert error <= 1e-6, name
    # Added once, whether or not a block is computed again: each microbatch by layers 0, 2 and 3.
    assert [len(values) for values in noted] == [3, 3] and direct[1] == 0
    for index, *values in zip((0, 2, 3), *noted, strict=True):
        assert sum(values) == pytest.approx(direct[index], rel=1e-6) and sum(values) > 0

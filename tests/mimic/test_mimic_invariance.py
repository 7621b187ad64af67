"""A teacher's routes and next tokens: one gradient on every layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_mm.config import RunConfig
from megatron_mm.earl.router_term import router_term, taught
from megatron_mm.mimic.batch import MimicBatch, TopExperts, TopTokens
from megatron_mm.mimic.targets import RouteTargets
from megatron_mm.train.sft import SupervisedFineTuning
from support.invariance import BROKEN, LAYOUTS, RECOMPUTE, compare, invariance_run, worst
from support.layouts import parallel_config, step_gradients, steps_batches

EXPERTS, TOP, ANSWERS = 9, 4, 5
LAYERS = {0: 2, 2: 0, 3: 2}  # of the student's four; two listen to one of the teacher's
# As in tests/parallel/test_router_term.py, of the same small gradients of routers.
TOLERANCE = 3e-5


class Mimics(SupervisedFineTuning):
    """Fine-tuning as a run with a teacher's file has it."""

    router_term = staticmethod(router_term)
    kd_coeff = 0.5


def seen_batches(run: RunConfig, pad_multiple: int, scale: float = 0.7) -> list[MimicBatch]:
    """The microbatches of a step, with a teacher's routes and answers at supervised positions."""
    generator, made = torch.Generator().manual_seed(4), []
    maps = {
        index: torch.rand(EXPERTS, run.model.language.num_experts, generator=generator).softmax(1)
        for index in LAYERS
    }
    for batch in steps_batches(run, pad_multiple):
        real, length = batch.num_real_tokens, len(batch.tokens_T)
        mask_T1 = batch.loss_mask_T.bool().unsqueeze(1)

        def top(size: int, n: int, real=real, length=length, mask_T1=mask_T1):
            drawn = torch.rand(real, size, generator=generator).mul(3).softmax(1).topk(n, 1)
            whole = torch.zeros(length, n, dtype=torch.int64), torch.zeros(length, n)
            whole[0][:real], whole[1][:real] = drawn.indices, drawn.values
            return whole[0] * mask_T1, whole[1] * mask_T1

        routes = {}
        for layer in (0, 2):
            experts, weights = top(EXPERTS, TOP)
            routes[layer] = TopExperts(experts.to(torch.int16), weights.half())
        tokens, p = top(run.model.language.vocab_size, ANSWERS)
        answers = TopTokens(tokens.int(), torch.where(p > 0, p.log(), 0.0))
        seen = MimicBatch(**vars(batch), teacher_routes=routes, teacher_answers=answers)
        made.append(taught(seen, RouteTargets(LAYERS, maps, scale / len(LAYERS))))
    return made


def without_routes(run: RunConfig, pad_multiple: int) -> list[MimicBatch]:
    return seen_batches(run, pad_multiple, 0.0)


def without_answers(run: RunConfig, pad_multiple: int) -> list[MimicBatch]:
    return [replace(b, teacher_answers=None) for b in seen_batches(run, pad_multiple)]


def step(ranks, size, sizes, multiple=None, make=seen_batches, **training):
    run = invariance_run(**training)
    arguments = (run, parallel_config(**sizes), None, multiple, make, Mimics())
    return ranks(size, step_gradients, *arguments)[0]


@pytest.fixture(scope="module")
def reference(ranks):
    return {multiple: step(ranks, 1, {}, multiple) for multiple in (1, 2)}


@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        *((name, "none") for name in ("TP2", "PP2", "EP2", "CP2", "PP2xVPP2", "TP2xPP2xEP2")),
        ("TP2", "full"),
        ("PP2", "all modules"),
    ],
)
def test_gradients_do_not_depend_on_the_layout(ranks, reference, name, recompute):
    size, sizes = LAYOUTS[name]
    found = step(ranks, size, sizes, **RECOMPUTE.get(recompute, {}))
    compare(found, reference[sizes.get("tp", 1) * sizes.get("cp", 1)], TOLERANCE)


def test_recompute_changes_no_bit_on_one_rank(ranks, reference):
    loss, gradients = step(ranks, 1, {}, 1, **RECOMPUTE["full"])
    assert loss == reference[1][0]
    assert all(torch.equal(gradients[name], reference[1][1][name]) for name in gradients)


@pytest.mark.parametrize("make", [without_routes, without_answers])
def test_a_step_without_either_is_another(ranks, reference, make):
    """So that the tests above can fail."""
    loss, gradients = step(ranks, 1, {}, 1, make)
    assert loss == reference[1][0]  # the metric is of the answers alone
    assert worst(gradients, reference[1][1])[0] > BROKEN

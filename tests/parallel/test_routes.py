"""Recorded routes replay exactly, whatever the layout and whatever is computed again."""

from __future__ import annotations

import pytest
import torch

from megatron_mm.config import ParallelConfig
from support.cascades import HARD, cascade_run
from support.invariance import BROKEN, LAYOUTS, RECOMPUTE, compare, invariance_run, worst
from support.layouts import parallel_config, step_gradients
from support.routes import (
    forbid,
    look_alikes,
    other_microbatchs_routes,
    random_routes,
    record_and_replay,
    refusal,
    tie,
    tie_and_shake,
    without_routes,
)

# What is saved of a repeated pass is shaken by 1e-6, which the gradients may show tenfold: some are
# differences of larger terms. One turned choice gives more than BROKEN.
SHAKEN = 1e-4
CHOSEN = ["TP2", "PP2", "EP2", "CP2", "PP2xVPP2", "TP2xPP2xEP2"]


@pytest.fixture(scope="module")
def reference(ranks):
    """By pad multiple: one rank's step with given routes."""
    return {
        multiple: ranks(
            1, step_gradients, invariance_run(), parallel_config(), None, multiple, look_alikes
        )[0]
        for multiple in (1, 2)
    }


@pytest.fixture(scope="module")
def recorded(ranks):
    """By pad multiple: the routes that one rank records, one a microbatch."""
    return {
        multiple: ranks(1, record_and_replay, invariance_run(), parallel_config(), multiple)[0][0]
        for multiple in (1, 2)
    }


def equal(one, other) -> bool:
    return all(
        torch.equal(a[i], b[i]) for a, b in zip(one, other, strict=True) for i in a.keys() | b
    )


def test_a_replay_of_the_own_routes_changes_no_bit(ranks):
    routes, _, replayed, logits, again = ranks(
        1, record_and_replay, invariance_run(), parallel_config()
    )[0]
    assert all(torch.equal(a, b) for a, b in zip(logits, again, strict=True))
    assert equal(replayed, routes)
    assert [len(r) for r in routes] == [4] * 4  # every layer of experts, every microbatch


@pytest.mark.parametrize("name", CHOSEN)
def test_records_are_whole_and_replayed_by_changed_routers(ranks, recorded, name):
    size, sizes = LAYOUTS[name]
    answers = ranks(size, record_and_replay, invariance_run(), parallel_config(**sizes))
    expected = recorded[sizes.get("tp", 1) * sizes.get("cp", 1)]
    dp = sizes.get("ep", 1) if name == "EP2" else 1
    for rank, (routes, changed, replayed, *_) in enumerate(answers):
        ours = expected[rank % dp :: dp] if dp > 1 else expected
        # As sets: rounding differs between layouts and may swap the order of near equals. It could
        # swap who comes last, too, but does not on these seeds.
        for mine, theirs in zip(routes, ours, strict=True):
            assert mine.keys() == theirs.keys()
            for index in mine:
                assert torch.equal(mine[index].sort(1).values, theirs[index].sort(1).values)
        assert equal(replayed, routes)
        assert not equal(changed, routes)


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("recompute", ["none", "full", "all modules"])
def test_each_microbatch_learns_with_its_own_routes(ranks, reference, name, recompute):
    size, sizes = LAYOUTS[name]
    run = invariance_run(**RECOMPUTE.get(recompute, {}))
    parallel = parallel_config(**sizes)
    found = ranks(size, step_gradients, run, parallel, None, None, look_alikes)[0]
    compare(found, reference[sizes.get("tp", 1) * sizes.get("cp", 1)])


@pytest.mark.parametrize("mistake", [without_routes, other_microbatchs_routes])
def test_other_routes_are_noticed(ranks, reference, mistake):
    """So that the test above can fail."""
    run = invariance_run()
    _, broken = ranks(1, step_gradients, run, parallel_config(), None, 1, mistake)[0]
    assert worst(broken, reference[1][1])[0] > BROKEN


def test_the_router_learns_from_given_routes(ranks, reference):
    """Gradients reach its logits through the weights of experts it did not choose."""
    _, gradients = reference[1]
    routers = [name for name in gradients if name.endswith("router.weight")]
    assert len(routers) == 4
    run = invariance_run()
    run.model.language.moe_aux_loss_coeff = 0.0
    _, alone = ranks(1, step_gradients, run, parallel_config(), None, 1, look_alikes)[0]
    assert all(alone[name].norm() > 0.1 * gradients[name].norm() for name in routers)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.pop(2), "routes for 3 layers of experts, layer 2 is not among them"),
        (lambda r: r.update({1: r[1][:-1]}), "routes of layer 1 have shape"),
        (lambda r: r[0].__setitem__((3, 0), 6), "routes of layer 0, position 3: [6,"),
        (lambda r: r[0].__setitem__(3, 2), "routes of layer 0, position 3: [2, 2]"),
        (lambda r: r[3].__setitem__(4, torch.tensor([1, -1])), "layer 3, position 4: [1, -1]"),
    ],
)
def test_routes_that_cannot_be_replayed_are_refused(ranks, change, words):
    from support.batches import microbatch

    run = invariance_run()
    routes = random_routes(run, microbatch(run.model, 5, (1,)), 0)
    change(routes)
    message = ranks(1, refusal, run, routes)[0]
    assert words in message and "\n" not in message


def test_forbidden_experts_get_no_token_and_others_are_chosen_as_before(ranks):
    run = invariance_run()
    run.parallel = ParallelConfig()
    mask = torch.tensor([True, False, True, False, False, True])
    before, during, after = ranks(1, forbid, run, {1: mask})[0]
    banned = torch.tensor([0, 2, 5])
    assert torch.isin(before[1], banned).any() and not torch.isin(during[1], banned).any()
    kept = ~torch.isin(before[1], banned).any(1)
    assert torch.equal(during[1][kept], before[1][kept])
    assert torch.equal(during[0], before[0])  # an earlier layer
    assert equal([after], [before])


@pytest.mark.parametrize(
    ("forbidden", "words"),
    [
        ({1: torch.tensor([True] * 5 + [False])}, "5 of 6 experts of layer 1 forbidden leaves 1"),
        ({4: torch.zeros(6, dtype=torch.bool)}, "use layers 0 to 3"),
        ({1: torch.zeros(5, dtype=torch.bool)}, "a bool for each of the 6 experts"),
    ],
)
def test_too_many_forbidden_experts_are_refused(ranks, forbidden, words):
    run = invariance_run()
    run.parallel = ParallelConfig()
    message = ranks(1, forbid, run, forbidden)[0]
    assert isinstance(message, str) and words in message and "\n" not in message


@pytest.mark.parametrize("name", [None, "EP2", "TP2xPP2xEP2"])
@pytest.mark.parametrize("recompute", ["full, odd blocks", "all modules"])
def test_a_repeated_pass_takes_the_routes_of_the_first(ranks, name, recompute):
    """Even where its own choice would be another. What megatron-core's balancing loss counts is no
    route, so it is left out."""
    size, sizes = (1, {}) if name is None else LAYOUTS[name]
    multiple = sizes.get("tp", 1)
    parallel = parallel_config(**sizes)
    plain, again = cascade_run(**HARD), cascade_run(training=RECOMPUTE[recompute], **HARD)
    for run in (plain, again):
        run.model.language.moe_aux_loss_coeff = 0.0
    expected = ranks(size, step_gradients, plain, parallel, tie, multiple)[0]
    compare(
        ranks(size, step_gradients, again, parallel, tie_and_shake, multiple)[0], expected, SHAKEN
    )
    shaken = ranks(size, step_gradients, plain, parallel, tie_and_shake, multiple)[0]
    assert all(torch.equal(shaken[1][key], value) for key, value in expected[1].items())

"""The second hop on every layout: the single rank's loss and gradients, whoever is handed over.

The comparison of test_invariance.py, with scales and gates away from where they start.
"""

from __future__ import annotations

import pytest
import torch

from megatron_mm.config import RunConfig
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.collate import collate
from megatron_mm.data.tiles import image_settings
from support.cascades import HARD, SOFT, all_or_nobody, cascade_run, forgetting, move_off_zero
from support.invariance import BROKEN, LAYOUTS, RECOMPUTE, compare, worst
from support.layouts import parallel_config, step_gradients, steps_batches
from support.scopes import clusters_of, scope_experts, with_skills

# What the gate does, and the microbatches. A bias opens every gate where the routes are to decide.
CASES = {
    "hard": (HARD, steps_batches),
    "soft": (SOFT, steps_batches),
    "all or nobody": (HARD | dict(delegate_gate_bias=8.0), all_or_nobody),
    "by chance": (HARD | dict(delegate_random_share=0.4), steps_batches),
    "one expert, distinct": (
        HARD | dict(delegate_topk=1, delegate_distinct=True),
        steps_batches,
    ),
}
SOME = ["TP2", "CP2", "EP2", "PP2xVPP2", "TP2xEP2 with expert-TP2", "PP2xCP2xEP2"]
# What a layout can get wrong is the gate (soft), the draws (by chance), and who is sent where.
HANDED_OVER = [(case, layout) for case in ("soft", "by chance") for layout in SOME]
HANDED_OVER += [
    (case, layout)
    for case in ("all or nobody", "one expert, distinct")
    for layout in ("EP2", "PP2xCP2xEP2")
]


def gradients(ranks, case: str, layout: str | None, multiple: int | None = None, **training):
    settings, batches = CASES[case]
    size, sizes = (1, {}) if layout is None else LAYOUTS[layout]
    run, parallel = cascade_run(training=training, **settings), parallel_config(**sizes)
    return ranks(size, step_gradients, run, parallel, move_off_zero, multiple, batches)[0]


@pytest.fixture(scope="module")
def reference(ranks):
    """By case and multiple of padding, one rank's result, computed when it is first asked for."""
    found: dict = {}

    def of(case: str, layout: str):
        sizes = LAYOUTS[layout][1]
        key = case, sizes.get("tp", 1) * sizes.get("cp", 1)
        if key not in found:
            found[key] = gradients(ranks, case, None, key[1])
        return found[key]

    return of


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_do_not_depend_on_the_layout(ranks, reference, layout):
    compare(gradients(ranks, "hard", layout), reference("hard", layout))


@pytest.mark.parametrize(("case", "layout"), HANDED_OVER)
def test_nor_on_who_is_handed_over(ranks, reference, case, layout):
    compare(gradients(ranks, case, layout), reference(case, layout))


@pytest.mark.parametrize("layout", ["TP2", "PP2xVPP2", "PP2xCP2xEP2"])
@pytest.mark.parametrize("recompute", ["full", "all modules"])
def test_nor_on_what_is_computed_again(ranks, reference, layout, recompute):
    case = "all or nobody"
    found = gradients(ranks, case, layout, **RECOMPUTE[recompute])
    compare(found, reference(case, layout))


def and_padding_alone(run: RunConfig, pad_multiple: int) -> list[Microbatch]:
    """A step, and a microbatch whose rows were all left out."""
    nothing = collate([], settings=image_settings(run), pad_id=0, pad_multiple=pad_multiple * 8)
    return [*steps_batches(run, pad_multiple), nothing]


@pytest.mark.parametrize("layout", [None, "CP2", "PP2"])
def test_padding_alone_is_not_handed_over_and_costs_no_price(ranks, reference, layout):
    """Its length follows from the layout, and so would what it costs."""
    size, sizes = (1, {}) if layout is None else LAYOUTS[layout]
    run, parallel = cascade_run(**SOFT), parallel_config(**sizes)
    found = ranks(size, step_gradients, run, parallel, move_off_zero, None, and_padding_alone)[0]
    compare(found, reference("soft", layout or "PP2"))


def test_every_parameter_of_the_second_hop_learns(reference):
    for case in ("hard", "soft", "all or nobody"):
        _, found = reference(case, "PP2")
        own = {name for name in found if ".delegate." in name}
        assert len(own) == 3 * 5  # of three layers: norm, gate and its bias, router, scale
        assert all(found[name].norm() > 1e-6 for name in own)


def test_where_nobody_is_handed_over_only_the_price_is_learnt_from(ranks):
    """No parameter is without a gradient: replicas would wait for it."""
    run = cascade_run(delegate_gate_bias=-9.0, **HARD)
    _, found = ranks(1, step_gradients, run, parallel_config(), move_off_zero)[0]
    own = {name: value for name, value in found.items() if ".delegate." in name}
    assert len(own) == 3 * 5
    for name, value in own.items():
        assert (value.norm() > 0) == name.endswith(("norm.weight", "gate.weight", "gate.bias"))


@pytest.mark.parametrize(
    "end",
    ["norm.weight", "gate.weight", "gate.bias", "router.weight", "scale"],
)
def test_a_lost_tensor_parallel_reduction_is_noticed(ranks, reference, end):
    settings, batches = CASES["soft"]
    end = f"moe.inner.delegate.{end}"
    _, broken = ranks(
        2,
        step_gradients,
        cascade_run(**settings),
        parallel_config(tp=2),
        forgetting(end),
        None,
        batches,
    )[0]
    error, parameter = worst(broken, reference("soft", "TP2")[1])
    assert error > BROKEN
    assert parameter.endswith(end)


# ---- beside what else there is


def test_the_shared_expert_beside_the_exchange(ranks, reference):
    """The first hop's dispatcher computes it; the second hop reads its result."""
    run = cascade_run(**HARD)
    hidden = parallel_config(ep=2, moe_shared_expert_overlap=True)
    found = ranks(2, step_gradients, run, hidden, move_off_zero, None, steps_batches)[0]
    compare(found, reference("hard", "EP2"))


def in_scope(engine) -> None:
    move_off_zero(engine)
    scope_experts(engine)


def test_experts_in_scope_learn_from_their_skill_in_both_hops(ranks):
    """On ranks as on one; and what the scope does not name stays as it is, to the bit."""
    run, parallel = cascade_run(**SOFT), parallel_config()
    one, plain = (
        ranks(1, step_gradients, run, parallel, prepare, 1, with_skills)[0]
        for prepare in (in_scope, move_off_zero)
    )
    both = ranks(2, step_gradients, run, parallel_config(ep=2), in_scope, None, with_skills)[0]
    compare(both, one)
    inside_LE = clusters_of(run).any(0)
    assert one[0] == plain[0]
    for name, gradient in one[1].items():
        if ".experts." not in name:
            assert torch.equal(gradient, plain[1][name]), name
            continue
        layer = int(name.split("layers.")[1].split(".")[0])
        moved = gradient.flatten(1).abs().amax(1) > 0
        assert moved.tolist() == inside_LE[layer].tolist(), name


# ---- a scale of zero


def shared(found: tuple, plain: tuple) -> list[str]:
    assert found[1].keys() > plain[1].keys()
    return [name for name in plain[1] if name != "replicas"]


@pytest.mark.parametrize("layout", [None, "TP2", "CP2", "EP2", "PP2xVPP2", "TP2xPP2xEP2"])
def test_a_scale_of_zero_is_E_to_the_bit(ranks, layout):
    """Loss and, without price and balancing of the second hop, all gradients of what E has. On one
    rank: on several, what is added to a gradient may be summed in another order."""
    size, sizes = (1, {}) if layout is None else LAYOUTS[layout]
    parallel = parallel_config(**sizes)
    cascade, plain = (
        cascade_run(pattern, delegate_price=0.0, **SOFT)
        for pattern in ("GC L *C GC L J *C J", "GE L *E GE L J *E J")
    )
    plain.model.layers = {}
    for run in (cascade, plain):
        run.model.language.moe_aux_loss_coeff = 0.0
    found, expected = (ranks(size, step_gradients, run, parallel)[0] for run in (cascade, plain))
    assert found[0] == expected[0]
    for name in shared(found, expected):
        assert torch.equal(found[1][name], expected[1][name]), name
    scales = [value for name, value in found[1].items() if name.endswith("delegate.scale")]
    assert len(scales) == 4 and all(scale.norm() > 0 for scale in scales)  # it learns at once

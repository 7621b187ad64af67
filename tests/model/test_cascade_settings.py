"""Settings of a layer of experts with a second hop: flags, refusals, rates."""

from __future__ import annotations

import pytest

from megatron_mm.config import ConfigError, experts_needed, load, route_width, validate
from megatron_mm.config.layers.cascade import CascadeSettings
from megatron_mm.engine.optimizer import module_of
from support.cascades import HARD, SOFT, cascade_run


@pytest.mark.parametrize(("distinct", "needed"), [(False, 2), (True, 4)])
def test_experts_that_a_layer_must_keep(distinct, needed):
    """Both hops may take the same ones, unless they must differ."""
    run = cascade_run(**SOFT)
    run.model.layers["C"].delegate_distinct = distinct
    assert experts_needed(run.model) == needed and route_width(run.model) == 4


def test_its_settings_are_flags(tmp_path):
    run = load(
        None,
        ["--preset", "tiny", "--hybrid-layer-pattern", "GC*C", "--delegate-topk", "3"],
    )
    assert run.model.layers == {"C": CascadeSettings(delegate_topk=3)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"delegate_topk": 7}, "delegate_topk is 7; allowed: 1 to the 6 experts that are left"),
        (
            {"delegate_topk": 5, "delegate_distinct": True},
            "delegate_topk is 5; allowed: 1 to the 4 experts that are left, num_experts 6 - "
            "moe_router_topk 2",
        ),
        ({"delegate_topk": 0}, "delegate_topk is 0; allowed: more than 0"),
        ({"delegate_hard_from": 1.5}, "delegate_hard_from is 1.5; allowed: 0 to 1"),
        ({"delegate_price_warmup": -1.0}, "delegate_price_warmup is -1.0; allowed: 0 to 1"),
        ({"delegate_planned_share": -0.1}, "delegate_planned_share is -0.1; allowed: 0 to 1"),
        ({"delegate_random_share": 2.0}, "delegate_random_share is 2.0; allowed: 0 to 1"),
        ({"delegate_price": -1.0}, "delegate_price is -1.0; allowed: 0 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    run = cascade_run("GC *C", **(SOFT | settings))
    with pytest.raises(ConfigError) as error:
        validate(run)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_another_dispatcher_is_refused():
    run = cascade_run("GC *C", **HARD)
    run.parallel.moe_token_dispatcher_type = "flex"
    run.parallel.expert_model_parallel_size = 2
    with pytest.raises(ConfigError, match="moe_token_dispatcher_type is 'flex'"):
        validate(run, 2)


def test_its_parts_learn_at_the_rates_of_what_they_stand_beside():
    prefix = "language.layers.0.moe.inner."
    for end, module in (
        ("delegate.router.weight", "router"),
        ("delegate.gate.weight", "router"),
        ("delegate.gate.bias", "router"),
        ("delegate.norm.weight", "language"),
        ("delegate.scale", "language"),
        ("experts.down", "experts"),
    ):
        assert module_of(prefix + end) == module

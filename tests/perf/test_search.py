"""What a search tries, and which errors it tells."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_mm.config import ConfigError, RunConfig, TrainingConfig, load, validate
from megatron_mm.perf import search
from megatron_mm.perf.hardware import Assumptions, gpu
from megatron_mm.perf.layout import plan_layout

H100 = gpu("H100")
SILENT = SimpleNamespace(total=None, update=lambda *_: None, set_description=lambda *_: None)
WORLD = 2


def tiny_run(*flags: str) -> RunConfig:
    return load(
        argv=["--preset", "tiny", "--bf16", "--seq-length", "512", "--global-batch-size", "8"]
        + [*flags]
    )


def recomputes(run: RunConfig) -> dict[tuple, int]:
    """How many layouts are tried with each recompute, and with what number of layers."""
    found: dict[tuple, int] = {}
    for one in search.candidates(run, WORLD, H100):
        validate(one, WORLD)
        train = one.training
        modules = train.recompute_modules if train.recompute_granularity == "selective" else ()
        key = train.recompute_granularity, *modules, train.recompute_num_layers
        found[key] = found.get(key, 0) + 1
    return found


@pytest.mark.parametrize(
    ("flags", "layers"),
    [
        ([], 2),
        (["--recompute-granularity", "full", "--recompute-num-layers", "4"], 4),
        (["--recompute-granularity", "selective", "--recompute-modules", "moe"], 2),
    ],
)
def test_every_layout_is_tried_with_every_recompute(flags, layers):
    found = recomputes(tiny_run(*flags))
    usual = TrainingConfig().recompute_num_layers
    assert found.keys() == {
        (None, usual),
        ("selective", "core_attn", "vision", usual),
        ("selective", "moe", "vision", usual),
        ("full", layers),
    }
    assert len(set(found.values())) == 1 and min(found.values()) > 4


def test_only_a_layout_may_be_impossible(monkeypatch):
    """A recompute that never works is an error, as is a run that never does."""
    monkeypatch.setattr(search, "RECOMPUTE", ((None, ["moe"]), *search.RECOMPUTE))
    with pytest.raises(ConfigError, match=r"recompute_modules.*\['moe'\].*recompute_granularity"):
        list(search.candidates(tiny_run(), WORLD, H100))
    monkeypatch.undo()

    def searched(run: RunConfig) -> search.Found:
        return search.search(run, WORLD, H100, Assumptions(), 1, 1.0, 1, SILENT)

    run = tiny_run()
    run.training.recompute_num_layers = 4  # which `full` alone would use
    with pytest.raises(ConfigError, match="recompute_num_layers is 4"):
        searched(run)
    run = tiny_run()
    run.backend.fp8_format = "hybrid"
    with pytest.raises(ConfigError, match="fp8_format is 'hybrid'; allowed in a plan"):
        searched(run)


@pytest.mark.parametrize("distributed", [True, False])
def test_what_a_rough_plan_sends_is_what_a_whole_one_does(distributed):
    """Without the distributed optimizer gradients are summed, and no parameter is gathered."""
    run = tiny_run(*([] if distributed else ["--no-use-distributed-optimizer"]))
    validate(run, WORLD)
    pieces = search.trace_pieces(run, 1, 1.0)
    rough = search.rough_rank(run, WORLD, list(search.model_stages(run)), 0, pieces)
    plans = rough, plan_layout(run, WORLD, H100, Assumptions()).ranks[0]
    # A few bytes beside them are of the loss and of the gradient's norm.
    found = [{link for link, size in plan.step.sent.items() if size > 1000} for plan in plans]
    assert found[0] == found[1] and found[0]


@pytest.mark.parametrize(("experts", "ranks"), [(48, 16), (60, 4), (7, 1), (64, 32)])
def test_experts_of_any_number_are_dealt_to_pieces(experts, ranks, monkeypatch):
    run = tiny_run("--num-experts", str(experts))
    validate(run, WORLD)
    traced, whole = [], search.trace_pieces

    def trace(*args):
        traced.append(whole(*args))
        return traced[-1]

    monkeypatch.setattr(search, "trace_pieces", trace)
    tried = search.candidates(run, WORLD, H100)
    monkeypatch.setattr(search, "candidates", lambda *_: [next(tried)])
    found = search.search(run, WORLD, H100, Assumptions(), 1, 1.0, 1, SILENT)
    (pieces,), (plan,) = traced, found.plans
    assert pieces.expert_ranks == ranks
    stages = list(search.model_stages(plan.run))
    rough = search.rough_rank(plan.run, WORLD, stages, 0, pieces)
    assert rough.elements == plan.ranks[0].elements

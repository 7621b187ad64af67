"""How many operators a decoding step runs: on small models they are its time."""

from __future__ import annotations

from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mm.benchmark.models import make_run
from megatron_mm.benchmark.prompts import NEVER, make_prompts
from megatron_mm.engine.engine import Engine
from megatron_mm.generation import generate as generation
from megatron_mm.generation.generate import Prompts
from megatron_mm.generation.sampling import Sampling
from megatron_mm.model.layers.clvr import Look
from megatron_mm.model.stack import SubLayer
from megatron_mm.parallel import groups

PROMPTS, GROUP, TURN = 4, 8, 8


class Operators(TorchDispatchMode):
    """Counts operators by the layer that runs them."""

    def __init__(self):
        super().__init__()
        self.layer, self.counts = "rest", Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        del types
        self.counts[self.layer] += 1
        return operator(*args, **(kwargs or {}))


def on_rank_counted(name: str, routes: bool) -> tuple[dict[str, float], float]:
    """Operators of a layer by its kind, and those of a whole step."""
    run = make_run(name)
    engine = Engine.create(run, groups.build(run.parallel))
    samples = make_prompts(run, name, PROMPTS, images=True, seed=0)
    seen, layers, old = Operators(), Counter(), {}

    def labelled(kind: type) -> None:
        old[kind] = kind.forward if kind is SubLayer else kind.step

        def forward(self, *args):
            seen.layer = type(getattr(self, "inner", self)).__name__
            layers[seen.layer] += 1
            try:
                return old[kind](self, *args)
            finally:
                seen.layer = "rest"

        setattr(kind, "forward" if kind is SubLayer else "step", forward)

    turns, steps = [], generation._Generation.steps

    def counted(self, count):
        turns.append(count)
        if len(turns) != 2:  # the first prepares what all steps share, the last ends completions
            return steps(self, count)
        layers.clear()
        with seen:
            return steps(self, count)

    for kind in (SubLayer, Look):
        labelled(kind)
    generation._Generation.steps = counted
    try:
        generation.generate(
            engine,
            Prompts(samples.__getitem__, range(PROMPTS)),
            Sampling((NEVER,), 1 + 3 * TURN),
            num_generations=GROUP,
            max_num_seqs=PROMPTS * GROUP,
            pad_id=0,
            record_routes=routes,
            tokens_a_turn=TURN,
        )
    finally:
        SubLayer.forward, Look.step = old[SubLayer], old[Look]  # the rank lives on
        generation._Generation.steps = steps
    assert turns == [TURN] * 3
    each = {kind: count / layers.get(kind, TURN) for kind, count in seen.counts.items()}
    return each, seen.counts.total() / TURN


# Operators that run in one layer, or in a step around the layers, with a small margin. Those that
# only make a view count too.
MOST = {
    "GatedDeltaNet": 78,
    "GatedAttention": 56,
    "MixtureOfExperts": 56,
    "Look": 33,
    "rest": 55,
}


@pytest.mark.parametrize(("name", "most"), [("tiny", 580), ("small", 1120)])
def test_a_step_runs_few_operators(ranks, name, most):
    ((each, whole),) = ranks(1, on_rank_counted, name, False)
    assert set(each) == set(MOST)
    for kind, limit in MOST.items():
        assert each[kind] <= limit, f"{kind}: {each[kind]}"
    assert whole <= most


def test_recording_routes_adds_few_operators(ranks):
    """One in each layer of experts, and a handful more: below 3 in 100."""
    plain, recorded = (ranks(1, on_rank_counted, "small", routes)[0][1] for routes in (False, True))
    assert plain < recorded <= 1.03 * plain

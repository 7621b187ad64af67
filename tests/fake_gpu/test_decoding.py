"""Decoding on the fake GPU: launches of a layer, and where the host waits.

A function that starts with `on_rank_` runs on the fake GPU; the test looks at its answer.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from megatron_mm.benchmark.models import make_run
from megatron_mm.benchmark.prompts import NEVER, make_prompts
from megatron_mm.config import RunConfig
from megatron_mm.engine.engine import Engine
from megatron_mm.generation import generate as generation
from megatron_mm.generation.generate import Prompts
from megatron_mm.generation.sampling import Sampling
from megatron_mm.parallel import groups
from support.cascades import with_cascade
from support.trainers import EP2, TP2
from tools.fake_gpu import install
from tools.fake_gpu.layers import label_layers

PROMPTS, GROUP, TURN = 4, 8, 8


def complete(engine: Engine, samples: list, tokens: int, seed: int = 0) -> list:
    found = generation.generate(
        engine,
        Prompts(samples.__getitem__, range(PROMPTS)),
        Sampling((NEVER,), tokens, seed=seed),
        num_generations=GROUP,
        max_num_seqs=PROMPTS * GROUP,
        pad_id=0,
        record_routes=True,
        tokens_a_turn=TURN,
    )
    return [(c.tokens_G, c.logprobs_G, c.routes_SLk) for group in found for c in group]


def on_rank_counted(run: RunConfig) -> tuple[dict[str, float], Counter, Counter]:
    """Launches of a layer in a step, by its kind; host waits of a turn by part of the model and by
    site."""
    gpu, engine = install(), Engine.create(run, groups.build(run.parallel))
    layers = label_layers(gpu, engine.chunks)
    samples = make_prompts(run, "tiny", PROMPTS, images=True, seed=0)
    turns, steps = [], generation._Generation.steps

    def counted(self, count):
        turns.append(None)
        if len(turns) != 2:  # the first one prepares what all steps share
            return steps(self, count)
        with gpu.counting() as turns[1]:
            steps(self, count)

    generation._Generation.steps = counted
    try:
        complete(engine, samples, 1 + 2 * TURN)
    finally:
        generation._Generation.steps = steps  # the rank lives on
    counts = turns[1]
    launches = {
        label: count / TURN / layers.get(label, 1)
        for label, count in counts.launches.by("label").items()
    }
    return launches, counts.waits.by("label"), counts.waits.by("what", "site")


def decoding_run(**parallel) -> RunConfig:
    run = make_run("tiny")
    run.training.bf16, run.backend.decoding_cuda_graph = True, False
    for name, value in parallel.items():
        setattr(run.parallel, name, value)
    return run


# In bf16, routes recorded. Where each operator of a norm counts, a norm is 6 to 8 of them; on CUDA
# its middle is one kernel. Before steps had ways of their own: 70, 71, 58, 35 and 55.
LAUNCHES = {
    "GatedDeltaNet": 54,
    "GatedAttention": 31,
    "MixtureOfExperts": 36,
    "Look": 20,
    "other": 34,
}


@pytest.mark.parametrize("parallel", [{}, TP2, EP2])
def test_no_layer_waits_for_the_host(gpu_ranks, parallel):
    for launches, waits, sites in gpu_ranks(
        2 if parallel else 1, on_rank_counted, decoding_run(**parallel)
    ):
        assert set(waits) == {"other"}, sites
        # The host reads the tokens of the turn, and the routes of the completions that end.
        assert waits.total() == 2, sites
        if not parallel:
            for label, most in LAUNCHES.items():
                assert launches[label] <= most, launches


def cascade_run(**parallel) -> RunConfig:
    return with_cascade(decoding_run(**parallel), "GC *C L J GC *C", delegate_hard_from=0.0)


@pytest.mark.parametrize("parallel", [{}, EP2])
def test_no_second_hop_waits_for_the_host(gpu_ranks, parallel):
    """Whoever is handed over, the sizes of a step are the same."""
    for launches, waits, sites in gpu_ranks(
        2 if parallel else 1, on_rank_counted, cascade_run(**parallel)
    ):
        assert set(waits) == {"other"} and waits.total() == 2, sites
        assert parallel or launches["CascadedExperts"] <= 3 * LAUNCHES["MixtureOfExperts"]


def on_rank_graphs(run: RunConfig) -> tuple[list, list, list[float]]:
    """Completions with graphs and without, and the launches of a step in each turn."""
    gpu, engine = install(), Engine.create(run, groups.build(run.parallel))
    samples = make_prompts(run, "tiny", PROMPTS, images=True, seed=0)
    launches, steps = [], generation._Generation.steps

    def counted(self, count):
        with gpu.counting() as counts:
            steps(self, count)
        launches.append(counts.launches.total() / count)

    generation._Generation.steps = counted
    try:
        run.backend.decoding_cuda_graph = True
        graphs = complete(engine, samples, 1 + 3 * TURN)
        run.backend.decoding_cuda_graph = False
        return graphs, complete(engine, samples, 1 + 3 * TURN), launches
    finally:
        generation._Generation.steps = steps  # the rank lives on


@pytest.mark.parametrize("run", [decoding_run(), cascade_run()], ids=["experts", "second hop"])
def test_a_graph_of_a_step_is_the_step(gpu_ranks, run):
    ((graphs, plain, launches),) = gpu_ranks(1, on_rank_graphs, run)
    for one, other in zip(graphs, plain, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
    # The graph, the numbers it draws with, copies of what it drew; and the turn's share of a step.
    assert launches[1] <= 8 < 200 < launches[4]


def on_rank_odd_vocabulary(run: RunConfig) -> list:
    engine = Engine.create(run, groups.build(run.parallel))
    return [
        c[0].tolist()
        for c in complete(engine, make_prompts(run, "tiny", PROMPTS, images=True, seed=0), 3)
    ]


def test_a_vocabulary_that_ranks_do_not_divide_is_gathered(gpu_ranks):
    """NCCL takes no part of a row: logits without their padding are not contiguous."""
    run = decoding_run(tensor_model_parallel_size=2, context_parallel_size=2)
    language = run.model.language
    language.vocab_size = 511
    language.linear_num_key_heads, language.linear_num_value_heads = 4, 8
    language.num_attention_heads = 8
    found = gpu_ranks(4, on_rank_odd_vocabulary, run)
    assert all(tokens == found[0] for tokens in found) and len(found[0]) == PROMPTS * GROUP
    assert max(token for tokens in found[0] for token in tokens) < 511

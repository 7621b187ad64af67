"""Where the host waits in training on layouts of several ranks: once in a layer of experts."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_mm.config import token_multiple
from megatron_mm.train.sft import SupervisedFineTuning
from support.batches import microbatch
from support.cascades import with_cascade
from support.checkpoint_runs import create, tiny_run
from support.gpu_bounds import EXCHANGE_WAITS
from tools.fake_gpu import install
from tools.fake_gpu.layers import label_layers

LAYOUTS = {
    "TP2": dict(tp=2),
    "PP2": dict(pp=2),
    "CP2": dict(cp=2),
    "EP2": dict(ep=2),
    "PP2xVPP2": dict(pp=2, vpp=2),
}
IMAGES = ((1, 0, 2), (0, 0), (2,), (1, 1, 1))  # of each sample in the microbatches of a step
PATTERN = "GE L *E GE J *E"


def on_rank_waits(
    sizes: dict[str, int], pattern: str = PATTERN, **training
) -> tuple[int, Counter, Counter]:
    """(passes through layers of experts, waits by label, waits by reason and site) of a step."""
    gpu, run = install(), with_cascade(tiny_run(sizes, bf16=True, **training), pattern)
    engine = create(run)
    layers = label_layers(gpu, engine.chunks)
    dp = engine.groups.pg.dp
    batches = [
        microbatch(run.model, seed, images, token_multiple(run))
        for seed, images in enumerate(IMAGES)
    ][dp.rank() :: dp.size()]
    with gpu.counting() as counts:
        engine.forward_backward(batches, SupervisedFineTuning())
    kind = "CascadedExperts" if "C" in pattern else "MixtureOfExperts"
    passes = layers[kind] * len(batches)
    return passes, counts.waits.by("label"), counts.waits.by("what", "label", "site")


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_layers_of_experts_wait(gpu_ranks, name):
    for passes, waits, sites in gpu_ranks(2, on_rank_waits, LAYOUTS[name]):
        assert 0 < waits["MixtureOfExperts"] <= passes, sites
        assert set(waits) <= {"MixtureOfExperts", "other"}, sites
        assert waits["other"] <= (EXCHANGE_WAITS * len(IMAGES) if name == "PP2" else 0), sites


@pytest.mark.parametrize("name", ["TP2", "EP2"])
def test_a_second_hop_waits_for_its_rows_and_their_exchange(gpu_ranks, name):
    pattern = PATTERN.replace("E", "C")
    for passes, waits, sites in gpu_ranks(2, on_rank_waits, LAYOUTS[name], pattern):
        assert set(waits) <= {"CascadedExperts", "other"} and waits["other"] == 0, sites
        assert passes < waits["CascadedExperts"] <= 3 * passes, sites


def on_rank_recomputed() -> tuple[int, Counter, Counter]:
    return on_rank_waits({}, recompute_granularity="full")


def test_a_repeated_layer_of_experts_waits_once_more(gpu_ranks):
    passes, waits, sites = gpu_ranks(1, on_rank_recomputed)[0]
    assert set(waits) <= {"MixtureOfExperts", "other"}, sites
    assert 0 < waits["MixtureOfExperts"] <= 2 * passes, sites

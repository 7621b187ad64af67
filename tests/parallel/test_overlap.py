"""Overlapped communication changes no gradient; a backend that is missing here is refused in one
line."""

from __future__ import annotations

import pytest
import torch

from megatron_mm.config import ConfigError, LoraConfig, ParallelConfig, RunConfig
from megatron_mm.engine.engine import Engine
from megatron_mm.parallel import groups
from megatron_mm.train.sft import SupervisedFineTuning
from support.batches import microbatch, small_run
from support.invariance import compare, invariance_run
from support.layouts import parallel_config, step_gradients, steps_batches
from support.weights import random_engine

CASES = {
    "EP2": (dict(ep=2), {}),
    "TP2xEP2": (dict(tp=2, ep=2, etp=1), {}),
    "EP2, recomputed": (
        dict(ep=2),
        dict(recompute_granularity="selective", recompute_modules=["moe"]),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_shared_expert_beside_the_exchange(ranks, case):
    sizes, training = CASES[case]
    run = invariance_run(**training)
    expected = ranks(2, step_gradients, run, parallel_config(**sizes))[0]
    hidden = parallel_config(moe_shared_expert_overlap=True, **sizes)
    compare(ranks(2, step_gradients, run, hidden)[0], expected)


def test_adapters_of_the_shared_expert_take_part(ranks):
    run = invariance_run()
    run.lora = LoraConfig(lora_rank=2)
    expected = ranks(2, step_gradients, run, parallel_config(ep=2))[0]
    hidden = parallel_config(ep=2, moe_shared_expert_overlap=True)
    compare(ranks(2, step_gradients, run, hidden)[0], expected)
    adapters = [n for n in expected[1] if "shared_experts" in n and n.endswith("lora.b")]
    assert adapters and all(expected[1][name].norm() > 0 for name in adapters)


def logits(overlap: bool) -> torch.Tensor:
    """Without gradients, on one rank: the way that completions take."""
    run = invariance_run()
    run.parallel = ParallelConfig(moe_shared_expert_overlap=overlap)
    engine = Engine.create(run, groups.build(run.parallel))
    batch = microbatch(run.model, 1)
    positions = SupervisedFineTuning().positions
    return engine.forward([batch], positions, lambda found, **_: found.logits())[0]


def test_completions_do_not_differ(ranks):
    (without,), (given,) = (ranks(1, logits, overlap) for overlap in (False, True))
    assert without.equal(given)


def unannounced(run: RunConfig) -> list[str]:
    """The parameters that learn without a call of the module that holds them. DDP's hooks, by which
    `overlap_param_gather` waits for a parameter's gather, are of such calls."""
    engine = random_engine(run)
    (stage,), announced = engine.chunks, set()
    for place, module in stage.named_modules():
        names = {f"{place}.{name}" for name, _ in module.named_parameters(recurse=False)}
        module.register_forward_pre_hook(lambda *_, names=names: announced.update(names))
    engine.training(True)
    engine.forward_backward(steps_batches(run, 1), SupervisedFineTuning())
    return sorted({name for name, p in stage.named_parameters() if p.requires_grad} - announced)


@pytest.mark.parametrize("pattern", ["GE Q *E L GE V J *E", "GC L *E GC J *C"])
def test_ddp_knows_when_every_parameter_is_needed(ranks, pattern):
    run = small_run(pattern, vision_memory="pyramid")
    assert ranks(1, unannounced, run)[0] == []
    # The dispatcher calls the parts of an overlapped shared expert, and not the expert.
    run.parallel = parallel_config(ep=2, moe_shared_expert_overlap=True)
    for missed in ranks(2, unannounced, run):
        assert [name for name in missed if "shared_experts" in name] == []


def refused(dispatcher: str) -> str:
    run = invariance_run()
    run.parallel = ParallelConfig(
        expert_model_parallel_size=2, moe_token_dispatcher_type=dispatcher
    )
    built = groups.build(run.parallel)
    with pytest.raises(ConfigError) as error:
        Engine.create(run, built)
    return str(error.value)


def test_deepep_needs_a_gpu(ranks):
    for said in ranks(2, refused, "flex"):
        assert said == (
            "moe_token_dispatcher_type is 'flex', but there is no CUDA device; allowed here: "
            "alltoall"
        )

"""A training step, a save, a load and a rollout on the fake GPU are those of the CPU, on six
layouts.

The same operators compute the same numbers, so little may differ: megatron-core overlaps its
reductions on a GPU, and adds in another order.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_mm import platform
from megatron_mm.checkpoint import sharded
from megatron_mm.checkpoint.parameters import finish_param_gather
from megatron_mm.config import RunConfig
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.engine.feed import broadcast_batches
from megatron_mm.engine.replicas import Replicas
from megatron_mm.errors import DivergedError
from megatron_mm.evaluation.questions import EvalSet
from megatron_mm.generation.generate import Prompts, generate
from megatron_mm.generation.sampling import Sampling
from megatron_mm.parallel.param_layout import layouts
from megatron_mm.train.sft import SupervisedFineTuning
from support.batches import microbatch
from support.checkpoint_runs import create, tiny_run, train, whole
from support.trainers import CP2, EP2, PP2, TP2, VPP2, digits_run
from support.weights import randomise_engine

LAYOUTS = {
    "one rank": (1, {}),
    "TP2 with sequence parallelism": (2, TP2),
    "PP2": (2, PP2),
    "CP2": (2, CP2),
    "EP2": (2, EP2),
    "PP2xVPP2": (2, PP2 | VPP2),
    "PP2, encoder beside": (2, PP2 | dict(vision_parallel="replica")),
}
ASKED = (0, 12, 8)  # questions with images; more of them than rows
NEW_TOKENS = 4
# Relative, of norms. Both sides compute in fp32 (6e-8), with the same kernels.
TOLERANCE = 1e-6


def on_rank_everything(run: RunConfig, folder: Path) -> dict:
    """Trains a step, saves, loads into another model, and lets that one answer."""
    engine = create(run)
    randomise_engine(engine)
    losses = train(engine, [0])
    finish_param_gather(engine)  # which on a GPU overlaps with the next forward pass
    Replicas(engine).check(1)
    trained = whole(engine)
    sharded.save(engine, {"consumed_samples": 2}, folder, 1)
    run.training.seed += 1
    loaded = create(run, engine.groups)
    state = sharded.load(loaded, folder)
    again = whole(loaded)
    differ = [name for name, tensor in trained.items() if not torch.equal(tensor, again[name])]
    devices = {p.device.type for _, p, _ in layouts(*loaded.chunks)}
    return {
        "losses": losses,
        "trained": trained,
        "differ": differ,
        "iteration": state["iteration"],
        "answers": answers(loaded),
        "devices": devices | {platform.device().type},
    }


def answers(engine) -> list:
    run = engine.run
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    questions = EvalSet(run.data.valid_data, run, tokenizer)
    found = generate(
        engine,
        Prompts(lambda i: questions[ASKED[i]].sample, ASKED),
        Sampling((), NEW_TOKENS, temperature=0.8, seed=3),
        num_generations=2,
        max_num_seqs=4,
        pad_id=tokenizer.pad_id,
    )
    return [[(c.tokens_G.tolist(), c.logprobs_G) for c in group] for group in found]


def on_rank_shared_image(run: RunConfig, adds: bool) -> str:
    """Trains on six samples of one image, as completions of a prompt are. Returns what the check of
    copies says.

    Args:
        adds: sum up the gradients of the repeated tiles with `index_add_`, which has no order.
    """
    engine = create(run)
    randomise_engine(engine)
    batch = microbatch(run.model, 1, (1,) * 6, 2)
    tiles = len(batch.pixels_NCHW) // 6
    memories = {k: replace(m, tiles=m.tiles % tiles) for k, m in batch.memories.items()}
    pixels, stream = batch.pixels_NCHW[:tiles], batch.stream_tiles % tiles
    batch = replace(batch, pixels_NCHW=pixels, stream_tiles=stream, memories=memories)
    put = torch.Tensor.index_put_

    def without_order(self, indices, values, accumulate=False):
        assert accumulate
        return self.index_add_(0, indices[0], values)

    if adds:
        torch.Tensor.index_put_ = without_order
    try:
        for _ in range(3):
            engine.forward_backward(
                broadcast_batches(engine.groups, [batch]), SupervisedFineTuning()
            )
            engine.update(engine.gradient_norm())
    finally:
        torch.Tensor.index_put_ = put
    finish_param_gather(engine)
    try:
        Replicas(engine).check(3)
    except DivergedError as error:
        return str(error)
    return "equal"


@pytest.mark.parametrize("where", ["stage", "replica"])
def test_copies_of_the_encoder_stay_equal_where_tiles_repeat(gpu_ranks, where):
    run = tiny_run(dict(tp=2, vision_parallel=where))
    assert gpu_ranks(2, on_rank_shared_image, run, False) == ["equal"] * 2
    if where == "replica":
        for said in gpu_ranks(2, on_rank_shared_image, run, True):
            assert "copies of parameter" in said and "vision." in said


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_gpus_numbers_are_the_cpus(ranks, gpu_ranks, scenes, tmp_path, name):
    size, sizes = LAYOUTS[name]
    run = digits_run(scenes, **sizes)
    here = ranks(size, on_rank_everything, run, tmp_path / "cpu")
    there = gpu_ranks(size, on_rank_everything, run, tmp_path / "gpu")
    for ours, theirs in zip(there, here, strict=True):
        assert (ours["devices"], theirs["devices"]) == ({"cuda"}, {"cpu"})
        assert ours["differ"] == [] and ours["iteration"] == 1
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=TOLERANCE)
        for group, expected in zip(ours["answers"], theirs["answers"], strict=True):
            for (tokens, logprobs), (wanted, wanted_logprobs) in zip(group, expected, strict=True):
                assert tokens == wanted
                assert (logprobs - wanted_logprobs).abs().max() < 1e-5  # of sizes up to 10
    ours, theirs = there[0]["trained"], here[0]["trained"]
    assert ours.keys() == theirs.keys()
    # A tenth of the first, clipped gradient.
    gradients = [name for name in theirs if name.startswith("exp_avg.")]
    assert len(gradients) > 70
    far = {k: difference(ours[k], theirs[k]) for k in gradients}
    assert {k: d for k, d in far.items() if d > TOLERANCE} == {}

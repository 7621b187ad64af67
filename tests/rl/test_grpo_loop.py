"""Runs of reinforcement learning: resuming, stops, bad rows and rewards, replayed routes.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_mm.config import ParallelConfig, RunConfig
from megatron_mm.errors import CheckpointError, DataError
from megatron_mm.model.routing import whole_routes
from megatron_mm.parallel import groups
from megatron_mm.rl.algorithms import ALGORITHMS
from megatron_mm.rl.settings import RLConfig
from megatron_mm.train.trainer import Trainer
from support.cascades import with_cascade
from support.grpo_runs import (
    TOKENS,
    grpo_run,
    on_rank_cut,
    on_rank_reference,
    on_rank_resume,
    on_rank_steps,
    trainer_of,
)
from support.trainers import CP2, PP2, TP2, VPP2

# ---- resuming ----


@pytest.mark.parametrize(("size", "sizes"), [(1, {}), (2, PP2), (2, {})])
def test_a_run_goes_on_with_the_prompts_and_tokens_it_would_have_had(
    ranks, scenes, tmp_path, size, sizes
):
    run = grpo_run(scenes, train_iters=8, **sizes)
    whole = ranks(size, on_rank_cut, run, tmp_path / "none", False)
    begun = ranks(size, on_rank_cut, run, tmp_path / "saved", True)
    resumed = ranks(size, on_rank_resume, run, tmp_path / "saved")
    for (steps, end), (first, _), (rest, new_end) in zip(whole, begun, resumed, strict=True):
        assert steps == first + rest and end == new_end


def on_rank_asked_to_stop(run: RunConfig) -> list[bool]:
    """Asks for a stop after the first step of a rollout; returns which steps are still done, and
    the rows consumed."""
    trainer = trainer_of(run)
    done = []
    for step in range(3):
        done.append(trainer.step() is not None)
        if not step and trainer.groups.world.rank() == trainer.groups.world.size() - 1:
            trainer.request_stop()
    trainer.source.close()
    return [*done, trainer.loader.consumed_samples]


def test_a_stop_waits_for_the_steps_of_its_rollout(ranks, scenes):
    for found in ranks(2, on_rank_asked_to_stop, grpo_run(scenes, **PP2)):
        assert found == [True, True, False, 8]


# ---- bad input ----


def test_a_reward_that_fails_costs_its_samples_only(ranks, scenes):
    run = grpo_run(scenes, reward_funcs=["support.even.even", "support.even.fails_on_short"])
    steps = ranks(1, on_rank_steps, run, 2)[0]
    failed = steps[0]["frac_reward_failed"]
    assert 0 < failed < 1
    assert steps[0]["rewards/fails_on_short/frac_failed"] == failed
    assert steps[0]["rewards/fails_on_short/mean"] == 1.0
    assert all(step["train/grad_norm"] > 0 for step in steps)


def on_rank_error(run: RunConfig) -> tuple[str, int]:
    trainer = None
    try:
        trainer = trainer_of(run)
        trainer.step()
    except DataError as error:
        return str(error), trainer.loader.consumed_samples if trainer else 0
    finally:
        if trainer is not None:
            trainer.source.close()
    return "nothing", 0


@pytest.mark.parametrize("sizes", [PP2, {}])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_completion_length": 118},
            "leaves no room for max_completion_length in seq_length: 10 tokens fit",
        ),
        (
            {"max_completion_length": 118, "on_bad_sample": "skip"},
            "0 groups to train on after 1 rounds of 8 prompts: ",
        ),
        (
            {
                "reward_funcs": ["support.even.same"],
                "algorithm": "dapo",
                "max_generation_rounds": 2,
            },
            "0 groups to train on after 2 rounds of 8 prompts: all rewards of every group",
        ),
        ({"reward_funcs": ["support.even.nothing"]}, "nothing"),
        ({"skill_map": "nowhere.json"}, "skill map nowhere.json: No such file"),
    ],
)
def test_what_cannot_go_on_is_one_line_on_every_rank(ranks, scenes, settings, message, sizes):
    for error, consumed in ranks(2, on_rank_error, grpo_run(scenes, **(settings | sizes))):
        assert message in error and "\n" not in error and consumed == 0


def test_a_reward_gets_the_routes_of_all_stages(ranks, scenes):
    run = grpo_run(scenes, reward_funcs=["support.even.routed"], max_num_seqs=8)
    one = ranks(1, on_rank_steps, run, 1)[0][0]
    assert one["frac_reward_failed"] == 0 and one["reward_std"] > 0
    for sizes in (PP2, TP2):
        for (step,) in ranks(2, on_rank_steps, replace(run, parallel=ParallelConfig(**sizes)), 1):
            assert step["reward"] == pytest.approx(one["reward"], abs=1e-9)
            assert step["frac_reward_failed"] == 0


def on_rank_other_objective(run: RunConfig, folder: Path) -> str:
    run.checkpoint.load = str(folder)
    run.training.objective, run.objectives["rl"] = "sft", RLConfig()
    try:
        Trainer(run, groups.build(run.parallel))
    except CheckpointError as error:
        return str(error)
    return "nothing"


def test_another_objectives_checkpoint_is_for_finetuning(ranks, scenes, tmp_path):
    ranks(1, on_rank_reference, grpo_run(scenes), tmp_path / "saved")
    (said,) = ranks(1, on_rank_other_objective, grpo_run(scenes), tmp_path / "saved")
    assert "was saved with objective grpo, this run's is sft; set finetune" in said


# ---- algorithms and their parts ----


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_every_algorithm_takes_steps(ranks, scenes, algorithm):
    run = grpo_run(scenes, algorithm=algorithm, train_iters=4, num_iterations=2)
    steps = ranks(1, on_rank_steps, run, 2)[0]
    assert all(0 < step["train/grad_norm"] < 1e4 for step in steps)


@pytest.mark.parametrize(("size", "sizes"), [(1, {}), (2, PP2)])
def test_the_reference_is_its_checkpoint_and_stays_it(ranks, scenes, tmp_path, size, sizes):
    """The divergence is zero at first and grows with the steps; a resumed run compares with the
    same reference."""
    ranks(size, on_rank_reference, grpo_run(scenes, **sizes), tmp_path / "ref")
    settings = dict(beta=0.1, ref_load=str(tmp_path / "ref"), lr=1e-2, train_iters=8)
    for kl_in_reward in (False, True):
        run = grpo_run(scenes, use_kl_in_reward=kl_in_reward, **settings, **sizes)
        whole = ranks(size, on_rank_cut, run, tmp_path / "none", False)
        assert whole[0][0][0]["kl"] <= 1e-9 < 1e-4 < whole[0][0][6]["kl"]
    begun = ranks(size, on_rank_cut, run, tmp_path / "cut", True)
    resumed = ranks(size, on_rank_resume, run, tmp_path / "cut")
    for (steps, end), (first, _), (rest, new_end) in zip(whole, begun, resumed, strict=True):
        assert steps == first + rest and end == new_end


# ---- replayed routes ----


def on_rank_replay(run: RunConfig) -> tuple[int, int]:
    """Changes every router; counts the positions of the next step whose experts are the recorded
    ones, and those at which the routers alone would choose others."""
    trainer = trainer_of(run)
    batches, _ = trainer.source.next_step(False)
    engine = trainer.engine
    recorded = [batch.routes or {} for batch in batches]
    with torch.no_grad():
        for chunk in engine.chunks:
            for name, param in chunk.named_parameters():
                if "router" in name:
                    param.copy_(param.roll(1, 0))
    routes = [{} for _ in batches]
    engine.forward(batches, lambda batch: batch.sampled, lambda *_, **__: None, routes=routes)
    again = [{} for _ in batches]
    free = [replace(batch, routes=None) for batch in batches]
    engine.forward(free, lambda batch: batch.sampled, lambda *_, **__: None, routes=again)
    same = changed = 0
    for given, record, other in zip(recorded, routes, again, strict=True):
        whole, without = (whole_routes(r, engine.groups.pg) for r in (record, other))
        for layer, used in whole.items():
            known = given[layer][:, 0] >= 0
            assert torch.equal(given[layer][known].sort(1).values, used[known].cpu().sort(1).values)
            same += int(known.sum())
            moved = without[layer].cpu().sort(1).values != given[layer].sort(1).values
            changed += int(moved.any(1)[known].sum())
    trainer.source.close()
    return same, changed


REPLAYS = {
    "R2": {"routing_replay": "R2"},
    "R3": {"routing_replay": "R3"},
    "drawn": {"routing_replay": "R3", "router_temperature": 1.0},
}


# Routes that are given, on all layouts and computed again: parallel/test_routes.py.
REPLAYED = [(sizes, "R3", None) for sizes in ({}, PP2, TP2, CP2, PP2 | VPP2)]
REPLAYED += [(sizes, replay, None) for sizes in ({}, PP2, TP2) for replay in ("R2", "drawn")]
REPLAYED += [(sizes, "R3", "full") for sizes in ({}, PP2 | VPP2)]


@pytest.mark.parametrize(("sizes", "replay", "recompute"), REPLAYED)
def test_the_trainer_uses_the_recorded_experts(ranks, scenes, sizes, replay, recompute):
    run = grpo_run(scenes, recompute_granularity=recompute, **REPLAYS[replay], **sizes)
    # With four stages one of the ranks has no experts at all.
    found = torch.tensor(ranks(2 if sizes else 1, on_rank_replay, run)).sum(0)
    assert found[0] > 100 and found[1] > found[0] / 2  # routers alone would have chosen others


def cascaded(run: RunConfig) -> RunConfig:
    """The run with a second hop, for those that a hard gate hands over."""
    return with_cascade(run, delegate_hard_from=0.0)


@pytest.mark.parametrize(
    ("sizes", "replay"), [({}, "R2"), ({}, "drawn"), (PP2 | VPP2, "R3"), (PP2 | VPP2, "drawn")]
)
def test_the_trainer_uses_the_recorded_experts_of_both_hops(ranks, scenes, sizes, replay):
    run = cascaded(grpo_run(scenes, recompute_granularity="full", **REPLAYS[replay], **sizes))
    found = torch.tensor(ranks(2 if sizes else 1, on_rank_replay, run)).sum(0)
    assert found[0] > 100 and found[1] > found[0] / 2


def test_replayed_routes_agree_with_what_was_sampled(ranks, scenes):
    """With the rollout's routes the trainer's log-probabilities are the rollout's; drawn experts
    give other completions."""
    said = []
    for replay in ("R3", "drawn"):
        steps = ranks(1, on_rank_steps, grpo_run(scenes, **REPLAYS[replay]), 2)[0]
        for step in steps:
            assert step["train/train_rollout_logprob_abs_diff"] <= 1e-5
            assert step.get("completions/max_length", TOKENS) == TOKENS
        said.append([row["completion"] for row in steps[0]["table"]])
    assert said[0] != said[1]

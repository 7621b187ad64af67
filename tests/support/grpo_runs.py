"""Runs of reinforcement learning on a model that has learnt nothing, for several tests."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from megatron_mm.config import RunConfig, preset, validate
from megatron_mm.earl.skill_map import SkillMap, save_skill_map
from megatron_mm.parallel import groups
from megatron_mm.train.trainer import Trainer
from support.fingerprints import state_hash
from support.trainers import digits_run
from support.weights import randomise_engine

TOKENS = 10
SKILLS = ("transcribe", "ocr", "count", "spatial", "arithmetic", "multihop")
ARMS = {
    "grpo": {},
    "earl": dict(
        router_reward_weight=0.5,
        router_loss_coeff=0.3,
        span_labels="support.even.thirds",
        span_credit=0.1,
        routing_replay="R3",
        algorithm="dapo",
    ),
    # Experts are drawn too, and the routers learn from those drawn.
    "drawn": dict(
        router_reward_weight=0.5,
        router_loss_coeff=0.3,
        router_temperature=0.5,
        span_labels="support.even.thirds",
        routing_replay="R3",
        rollout_batch_size=4,
    ),
    # Some replicas keep no group of a round, and steps are made of what several rounds kept.
    "filtered": dict(
        algorithm="dapo",
        reward_funcs=["support.even.sometimes"],
        global_batch_size=8,
        rollout_batch_size=4,
    ),
}


def grpo_run(scenes, **settings) -> RunConfig:
    """Returns a run of two steps a rollout that rewards even token ids."""
    defaults = dict(
        objective="grpo",
        global_batch_size=16,
        micro_batch_size=2,
        num_generations=4,
        rollout_batch_size=8,
        max_completion_length=TOKENS,
        reward_funcs=["support.even.even"],
        reward_num_workers=1,
        reward_timeout=60.0,  # a worker that starts beside other tests on busy cores
        train_iters=4,
        lr=1e-5,
        valid_data=None,
    )
    return digits_run(scenes, **(defaults | settings))


def arm(scenes, skill_map, name: str, **settings) -> RunConfig:
    """Returns the run of an arm, with its skill map where it has a router term."""
    extra = {"skill_map": skill_map} if "router_loss_coeff" in ARMS[name] else {}
    return grpo_run(scenes, **(ARMS[name] | extra | settings))


def write_skill_map(path: Path) -> Path:
    """Writes a map for the runs' model: two layers, experts as in the tiny preset."""
    language = preset("tiny").language
    experts, k = language.num_experts, language.moe_router_topk
    skills = {
        skill: [[n % experts, (n + 1) % experts], [(2 * n) % experts]]
        for n, skill in enumerate(SKILLS)
    }
    save_skill_map(SkillMap(2, experts, k, skills), path)
    return path


def trainer_of(run: RunConfig) -> Trainer:
    """Returns a trainer in a job that has built no groups yet. The caller closes its source."""
    validate(run, torch.distributed.get_world_size())
    # The pool's ranks are daemons, which may not start reward workers.
    multiprocessing.current_process()._config["daemon"] = False
    trainer = Trainer(run, groups.build(run.parallel))
    if not run.checkpoint.load:
        randomise_engine(trainer.engine)
    return trainer


def step_of(trainer: Trainer) -> dict:
    """Returns a step's metrics without its times, and its table of completions."""
    metrics = trainer.step()
    found = {k: v for k, v in metrics.items() if "time" not in k and "timing" not in k}
    return found | {"table": trainer.source.table}


def on_rank_steps(run: RunConfig, steps: int) -> list[dict]:
    """Returns what `step_of` returns for each of `steps` steps."""
    trainer = trainer_of(run)
    try:
        return [step_of(trainer) for _ in range(steps)]
    finally:
        trainer.source.close()


def on_rank_reference(run: RunConfig, folder: Path) -> list[dict]:
    """Saves a run that has taken no step."""
    run.checkpoint.save = str(folder)
    trainer = trainer_of(run)
    trainer.save()
    trainer.saver.finish()
    trainer.source.close()
    return []


def on_rank_cut(run: RunConfig, folder: Path, cut: bool) -> tuple[list[dict], str]:
    """Takes the steps of four rollouts; with a cut, of two, and saves for `on_rank_resume`. Returns
    what `step_of` returns for each, and a hash of the end's state."""
    run.checkpoint.save = str(folder)
    trainer = trainer_of(run)
    steps = 4 if cut else 8
    found = [step_of(trainer) for _ in range(steps)]
    if cut:
        trainer.save()
        trainer.saver.finish()
    trainer.source.close()
    return found, state_hash(trainer.engine, generators=False)


def on_rank_resume(run: RunConfig, folder: Path) -> tuple[list[dict], str]:
    run.checkpoint.load = str(folder)
    trainer = trainer_of(run)
    found = [step_of(trainer) for _ in range(4)]
    trainer.source.close()
    return found, state_hash(trainer.engine, generators=False)


def assert_same_steps(one: list[dict], other: list[dict], bound: float) -> None:
    """Asserts that two runs' metrics are equal up to `bound`, relative and absolute."""
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        assert a.keys() == b.keys()
        for name in a.keys() - {"table"}:
            if name == "train/train_rollout_logprob_abs_diff":
                assert max(a[name], b[name]) <= 1e-5
            # The one is a mean over replicas by definition, the other is of no use in RL.
            elif name not in ("rollout/moe/mutual_information", "moe/load_balancing_loss"):
                assert b[name] == pytest.approx(a[name], rel=bound, abs=bound), (step, name)

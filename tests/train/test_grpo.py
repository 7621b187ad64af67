"""Reinforcement learning in the loop: the same steps on every layout, replayed routes, resuming.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

import json
import multiprocessing
import zlib
from itertools import chain

import pytest
import torch
from trainers import LAYOUTS, digits_run

from megatron_mm.config import RunConfig, validate
from megatron_mm.parallel import groups
from megatron_mm.parallel.layout import layouts
from megatron_mm.rl.skill_map import SkillMap, save_skill_map
from megatron_mm.train.loop import Trainer

SKILLS = ("transcribe", "ocr", "count", "spatial", "arithmetic", "multihop")
TOKENS = 10


def grpo_run(scenes, **settings) -> RunConfig:
    defaults = dict(
        objective="grpo",
        global_batch_size=16,
        micro_batch_size=2,
        num_generations=4,
        rollout_batch_size=8,
        max_completion_length=TOKENS,
        reward_funcs=["even.even"],
        reward_num_workers=1,
        train_iters=4,
        lr=1e-5,
        valid_data=None,
    )
    return digits_run(scenes, **(defaults | settings))


def trainer_of(run: RunConfig) -> Trainer:
    # The pool's ranks are daemons, which may not start reward workers.
    multiprocessing.current_process()._config["daemon"] = False
    trainer = Trainer(run, groups.build(run.parallel))
    for name, param, layout in layouts(*trainer.engine.chunks):
        if param.dim() > 1:
            seed = zlib.crc32(name.encode())
            whole = torch.randn(layout.global_shape, generator=torch.Generator().manual_seed(seed))
            scale = 1.0 if name == "embedding.weight" else layout.global_shape[-1] ** -0.5
            layout.held(param.data).copy_(whole[layout.block] * scale)
    trainer.engine.optimizer.reload_model_params()
    return trainer


def on_rank_steps(run: RunConfig, steps: int) -> list[dict]:
    validate(run, torch.distributed.get_world_size())
    trainer = trainer_of(run)
    found = []
    try:
        for _ in range(steps):
            metrics = trainer.step()
            found.append(
                {k: v for k, v in metrics.items() if "time" not in k and "timing" not in k}
            )
            found[-1]["table"] = trainer.source.table
    finally:
        trainer.source.close()
    return found


def assert_same_steps(one: list[dict], other: list[dict], bound: float) -> None:
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        assert a.keys() == b.keys()
        for name in a.keys() - {"table"}:
            if name == "train/train_rollout_logprob_abs_diff":
                assert max(a[name], b[name]) <= 1e-5
            # The one is a mean over replicas by definition, the other is of no use in RL.
            elif name not in ("rollout/moe/mutual_information", "load_balancing_loss"):
                assert b[name] == pytest.approx(a[name], rel=bound, abs=bound), (step, name)


@pytest.fixture(scope="module")
def skill_map(tmp_path_factory) -> str:
    """Of the runs' model: two layers, experts as in the tiny preset."""
    run = digits_run(tmp_path_factory.mktemp("none"))
    experts, k = run.model.language.num_experts, run.model.language.moe_router_topk
    skills = {
        skill: [[n % experts, (n + 1) % experts], [(2 * n) % experts]]
        for n, skill in enumerate(SKILLS)
    }
    path = tmp_path_factory.mktemp("map") / "map.json"
    save_skill_map(SkillMap(2, experts, k, skills), path)
    return str(path)


ARMS = {
    "grpo": {},
    "earl": dict(
        router_reward_weight=0.5,
        router_loss_coeff=0.3,
        span_labels="even.thirds",
        span_credit=0.1,
        routing_replay="R3",
        algorithm="dapo",
    ),
}


def arm(scenes, skill_map, name: str, **settings) -> RunConfig:
    extra = {"skill_map": skill_map} if name == "earl" else {}
    return grpo_run(scenes, **(ARMS[name] | extra | settings))


@pytest.fixture(scope="module")
def one_rank(ranks, scenes, skill_map):
    return {name: ranks(1, on_rank_steps, arm(scenes, skill_map, name), 4)[0] for name in ARMS}


@pytest.mark.parametrize("name", ARMS)
def test_a_step_learns_from_what_was_sampled(one_rank, name):
    steps = one_rank[name]
    assert [bool(step["table"]) for step in steps] == [True, False, True, False]
    for step in steps:
        assert step["grad norm"] > 1e-3 and step["train/train_rollout_logprob_abs_diff"] <= 1e-5
    begun = steps[0]
    assert 0 < begun["reward_std"] and begun["completions/max_length"] == TOKENS
    assert begun["consumed samples"] == 8 and steps[2]["consumed samples"] == 16
    if name == "earl":
        assert begun["rewards/router/mean"] > 0
        assert 0 < begun["rollout/moe/hit_rate"] < 1 and "rollout/moe/hit_rate/ocr" in begun
        assert 0 < begun["rollout/moe/hit_rate_shuffled"] < 1
        assert begun["rollout/moe/max_violation"] > 0
    # The second step is off the policy that sampled: its ratios are no longer 1.
    assert begun["clip_ratio/region_mean"] == 0 and begun["entropy"] > 1


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one rank"])
@pytest.mark.parametrize("name", ARMS)
def test_steps_do_not_depend_on_the_layout(ranks, scenes, skill_map, one_rank, name, layout):
    """Rewards, losses and gradient norms of four steps, two from each of two rollouts. Adam divides
    gradients by their size, so their rounding grows to that of a step: hence a small one, lest a
    token of the second rollout flips, and the wider bound."""
    size, sizes = LAYOUTS[layout]
    for rank in ranks(size, on_rank_steps, arm(scenes, skill_map, name, **sizes), 4):
        assert_same_steps(one_rank[name], rank, 2e-3)
        assert_same_steps(one_rank[name][:1], rank[:1], 2e-5)

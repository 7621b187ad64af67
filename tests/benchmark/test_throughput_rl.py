"""The throughput of reinforcement learning: a rollout and all of its steps are one round."""

from __future__ import annotations

import multiprocessing

import pytest

from megatron_mm.benchmark import throughput  # noqa: E402
from megatron_mm.config import RunConfig
from megatron_mm.parallel import groups
from support.grpo_runs import TOKENS, grpo_run
from support.trainers import PP2


def on_rank(run: RunConfig) -> dict:
    # The pool's ranks are daemons, which may not start reward workers.
    multiprocessing.current_process()._config["daemon"] = False
    built = groups.build(run.parallel)
    return throughput.measure(
        run, built, kinds=("real",), routings=("natural",), rounds=1, warmup=0
    )


def test_a_round_is_a_rollout_with_its_steps(ranks, scenes):
    run = grpo_run(scenes, train_iters=100, **PP2)
    one, other = ranks(2, on_rank, run)
    assert one["sides"] == other["sides"]
    (side,) = one["sides"].values()
    (work,) = side["work"]
    assert work["samples"] == 32  # 8 prompts, 4 completions of each, in two steps
    assert 32 <= work["supervised"] <= 32 * TOKENS < work["tokens"]
    assert side["supervised_tokens_per_second"]["median"] == pytest.approx(
        work["supervised"] / side["seconds"]["median"]
    )
    assert {"rollout", "forward", "backward", "optimizer"} <= side["phases"].keys()
    assert "data" not in side["phases"] and "pp send/recv" in side["phases"]
    assert 0 < side["rollout_seconds"]["rollout"] < side["seconds"]["median"]

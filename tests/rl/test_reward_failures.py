"""A run whose rewards fail stops with their error, on every rank, and keeps what it has trained.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from megatron_mm.config import RunConfig, validate
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.parallel import groups
from megatron_mm.rl.advantages import weighted
from megatron_mm.train.loop import train
from support.grpo_runs import grpo_run, on_rank_steps, trainer_of
from support.trainers import PP2, TP2

HERE = "support.even"


def on_rank_error(run: RunConfig) -> tuple[str, int, int]:
    """Returns the error of the first step that has one, the steps done, the rows consumed."""
    trainer = trainer_of(run)
    try:
        for _ in range(4):
            trainer.step()
    except DataError as error:
        return str(error), trainer.iteration, trainer.loader.consumed_samples
    finally:
        trainer.source.close()
    return "nothing", trainer.iteration, trainer.loader.consumed_samples


STOPPED = [
    # a function that raises, one that returns no reward, a column that is not there
    (
        [f"{HERE}.fails_after"],
        {},
        "every reward of a step failed, the first because: ",
        "ValueError: the judge is down",
    ),
    (
        ["exact", f"{HERE}.fails_after"],
        {},
        "every reward of a step failed",
        "fails_after: ValueError",
    ),
    (
        [f"{HERE}.none_at_all"],
        {},
        "no reward applied to any of the 16 completions of a step: none_at_all returned None",
        "ground_truth",
    ),
    ([f"{HERE}.routed(routed_experts=1)"], {}, "", "routed"),
    (
        ["pattern"],
        {},
        "every reward of a step failed",
        "missing 1 required keyword-only argument: 'pattern'",
    ),
    (["pattern(pattern='(')"], {}, "every reward of a step failed", "pattern: "),
    # a share of them
    (
        [f"{HERE}.even", f"{HERE}.fails_on_short"],
        {"max_reward_failures": 0.05},
        " of 16 rewards of a step failed",
        "odd end",
    ),
    # dynamic sampling drops such groups, and would look for others in vain
    (
        [f"{HERE}.fails_after"],
        {"algorithm": "dapo"},
        "every reward of a step failed",
        "the judge is down",
    ),
    (
        [f"{HERE}.none_at_all"],
        {"algorithm": "dapo"},
        "no reward applied to any of the 32 completions",
        "none_at_all",
    ),
]


@pytest.mark.parametrize("sizes", [PP2, {}])
@pytest.mark.parametrize(("functions", "settings", "message", "reason"), STOPPED)
def test_failed_rewards_stop_the_run_on_every_rank(
    ranks, scenes, sizes, functions, settings, message, reason
):
    run = grpo_run(scenes, reward_funcs=functions, **settings, **sizes)
    found = ranks(2, on_rank_error, run)
    for error, steps, consumed in found:
        assert message in error and reason in error and "\n" not in error
        assert (steps, consumed) == (0, 0)
    assert len({error for error, *_ in found}) == 1


def test_one_replica_alone_is_no_reason_to_stop(ranks, scenes):
    """The share is that of the whole step: one replica's failures are half of it."""
    settings = dict(reward_funcs=[f"{HERE}.even", f"{HERE}.fails_on_short"])
    for share, stopped in ((1.0, False), (0.01, True)):
        run = grpo_run(scenes, max_reward_failures=share, **settings)
        for error, *_ in ranks(2, on_rank_error, run):
            assert ("rewards of a step failed" in error) == stopped


def test_a_reward_without_weight_may_fail(ranks, scenes):
    functions = [f"{HERE}.fails_after", f"{HERE}.even", f"{HERE}.none_at_all"]
    run = grpo_run(scenes, reward_funcs=functions, reward_weights=[0.0, 1.0, 0.0])
    steps = ranks(1, on_rank_steps, run, 2)[0]
    assert steps[0]["rewards/fails_after/frac_failed"] == 1
    assert steps[0]["frac_reward_failed"] == 0 and steps[0]["train/grad_norm"] > 0


@pytest.mark.parametrize("sizes", [PP2, TP2])
def test_a_conversational_reward_trains(ranks, scenes, sizes):
    even, read = (
        ranks(2, on_rank_steps, grpo_run(scenes, reward_funcs=[f"{HERE}.{name}"], **sizes), 2)
        for name in ("even", "conversational")
    )
    for one, other in zip(even, read, strict=True):
        assert other[0]["frac_reward_failed"] == 0 and other[0]["reward"] == one[0]["reward"]
        for a, b in zip(one, other, strict=True):
            assert a["train/grad_norm"] == b["train/grad_norm"] > 0


def on_rank_train(run: RunConfig) -> str:
    validate(run, torch.distributed.get_world_size())
    # The pool's ranks are daemons, which may not start reward workers.
    multiprocessing.current_process()._config["daemon"] = False
    try:
        train(run, groups.build(run.parallel))
    except DataError as error:
        return str(error)
    return "nothing"


def test_what_was_trained_is_saved(ranks, scenes, tmp_path):
    """Two rollouts of 32 completions are good, the third fails."""
    run = grpo_run(
        scenes,
        reward_funcs=[f"{HERE}.fails_after(calls=64)"],
        train_iters=8,
        save=str(tmp_path / "saved"),
        output_dir=str(tmp_path / "out"),
    )
    (error,) = ranks(1, on_rank_train, run)
    assert error.startswith("every reward of a step failed, the first because: ")
    assert error.endswith("fails_after: ValueError: the judge is down")
    assert [path.name for path in (tmp_path / "saved").glob("iter_*")] == ["iter_0000004"]


def test_weights_that_are_all_zero_teach_nothing(scenes):
    run = grpo_run(scenes, reward_weights=[0.0])
    with pytest.raises(
        ConfigError, match=r"rl.reward_weights is \[0.0\]; allowed: none, or at least"
    ):
        validate(run, 1)


def test_a_failure_makes_no_group_informative():
    """All that differs in the group is that one reward failed; what is kept is equal."""
    nan = float("nan")
    rewards = torch.tensor([[[1.0, 1.0], [1.0, nan], [1.0, 1.0]]])
    failed = torch.tensor([[[False, False], [False, True], [False, False]]])
    used, total = weighted(rewards, failed, torch.tensor([1.0, 1.0]))
    assert total[0].tolist()[::2] == [2.0, 2.0] and total[0, 1].isnan()
    assert used[0, 1].isnan().all()
    # One that has no weight decides nothing, whether it applies or fails.
    used, total = weighted(
        rewards[..., ::-1] if False else rewards, failed, torch.tensor([1.0, 0.0])
    )
    assert total[0].tolist() == [1.0, 1.0, 1.0]

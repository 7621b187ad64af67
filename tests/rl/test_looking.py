"""Reinforcement of looking: rewards that see where a completion looked, slots outside the loss, and
the same numbers with a pipeline and replayed routes."""

from __future__ import annotations

import pytest
import torch

from megatron_mm.config import RunConfig
from megatron_mm.config.layers.queries import window
from megatron_mm.data.looks import LookTokens
from megatron_mm.data.sample import Sample
from megatron_mm.rl.completion_batch import answered, completion_batch
from megatron_mm.rl.rewards.looking import look_if_right, look_iou
from support.grpo_runs import grpo_run, trainer_of
from support.trainers import PP2, with_glimpses

LOOKS = LookTokens(query_id=7, slot_id=9, slots=2, most=3, min_scale=0.1)


def test_a_window_is_within_the_image():
    assert window([0.5, 0.25, 0.5]) == (0.0, 0.25, 0.5, 0.75)
    assert window([0.9, 0.9, 0.4]) == pytest.approx((0.7, 0.7, 1.0, 1.0))


def test_looking_pays_where_the_answer_is_right():
    place = [[0.5, 0.5, 0.5]]
    found = look_if_right(
        completions=["cell 3<look> is 6", "is 6", "cell 3<look> is 5", "6"],
        ground_truth=["6", "6", "6", None],
        looked=[[place], [], [place], [place]],
        scorer=["last_word"] * 4,
    )
    assert found == [1.0, 0.0, 0.0, None]


def test_windows_are_compared_with_boxes_in_their_order():
    box = {"image": 0, "box": [0.25, 0.25, 0.75, 0.75]}
    exact, half = [[0.5, 0.5, 0.5]], [[0.5, 0.75, 0.5]]
    found = look_iou(
        completions=[""] * 6,
        looked=[[exact], [half], [], [exact, exact], [exact], [exact, exact]],
        looks=[[box], [box], [box], [box], [None], [None, box]],
    )
    assert found == [1.0, pytest.approx(1 / 3), 0.0, 0.5, None, 1.0]


def test_slots_are_in_no_loss():
    """What is measured stands at the positions that the policy drew from."""
    prompt = Sample(
        torch.tensor([1, 2, 7, 9, 9, 3]), torch.zeros(6), torch.zeros(6), [], "r:1",
        queries=(2,), targets=(None,), slots=2,
    )  # fmt: skip
    own = torch.tensor([4, 7, 5, 7])
    made = answered(prompt, own, LOOKS)
    assert made.tokens_T.tolist() == [1, 2, 7, 9, 9, 3, 4, 7, 9, 9, 5, 7]
    assert made.queries == (2, 7) and len(made.targets) == 2
    batch = completion_batch([made], [0], settings=None, pad_id=0, pad_multiple=1)
    assert batch.sampled.tolist() == [5, 6, 9, 10]
    assert batch.labels_T[batch.sampled].tolist() == own.tolist()
    assert batch.lengths_N.tolist() == [4]
    assert batch.queries.positions_N.tolist() == [2, 7]
    assert made.predicting(3).tolist() == [6, 9, 10]


def on_rank_step(run: RunConfig) -> dict:
    """The metrics of the first step of a model of random weights, which looks at random."""
    trainer = trainer_of(run)
    try:
        return trainer.step()
    finally:
        trainer.source.close()


def looking_run(look_scenes, **settings) -> RunConfig:
    run = grpo_run(
        look_scenes,
        reward_funcs=["support.even.even", "look_if_right", "look_iou"],
        routing_replay="R3",
        max_completion_length=24,
        **settings,
    )
    return with_glimpses(run)


def test_grpo_looks_alike_with_a_pipeline(ranks, look_scenes):
    one = ranks(1, on_rank_step, looking_run(look_scenes))[0]
    two = ranks(2, on_rank_step, looking_run(look_scenes, **PP2))[0]
    for name in ("reward", "rewards/look_iou/mean", "train/grad_norm", "look/scale"):
        assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-6), name
    assert 0 < one["look/scale"] < 1 and one["rewards/look_iou/mean"] > 0

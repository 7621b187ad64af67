"""Reinforcement of looking: rewards that see where a completion looked, slots outside the loss, and
the same numbers with a pipeline and replayed routes."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from megatron_mm.config import ConfigError, RunConfig, validate
from megatron_mm.config.layers.queries import query_settings, window
from megatron_mm.data.loading.reader import Prompt
from megatron_mm.data.looks import LookTokens
from megatron_mm.data.sample import Sample
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.generation.answers import answered
from megatron_mm.generation.lanes import Completion
from megatron_mm.rl.completion_batch import completion_batch
from megatron_mm.rl.rewards.looking import look_if_right, look_iou
from megatron_mm.rl.rewards.result import Rewards
from megatron_mm.rl.rollout.columns import Columns
from megatron_mm.rl.rollout.draw import Group, Rollout
from megatron_mm.rl.rollout.score import Scorer
from megatron_mm.rl.settings import RLConfig, resolved
from support.grpo_runs import grpo_run, trainer_of
from support.trainers import PP2, with_glimpses
from support.weights import random_engine

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


FIRST, SECOND = [{"box": [0, 0, 0.5, 0.5]}], [{"box": [0.5, 0.5, 1, 1]}]  # of two answers


def on_rank_boxes(run: RunConfig) -> list:
    """The boxes that rewards are given for this replica's completions: of a row with two answers,
    whose prompt holds the first, and of a row without boxes. Two replicas have one row each."""
    multiprocessing.current_process()._config["daemon"] = False  # for reward workers
    engine, given = random_engine(run), []
    scorer = Scorer(
        resolved(run), engine, load_tokenizer(run.data.tokenizer_model), None, Columns()
    )

    def remember(prompts, completions, ids, columns, routes):
        given.extend(columns["looks"][:: run.section(RLConfig).num_generations])
        return Rewards.empty(scorer.names, len(completions))

    drawn = Completion(torch.tensor([5]), torch.zeros(1), True, looked_NQ3=torch.zeros(0, 1, 3))
    groups = []
    for number, (queries, more) in enumerate([((1,), {"looks": FIRST + SECOND}), ((), {})]):
        sample = Sample(*[torch.zeros(4).long()] * 2, torch.zeros(4), [], "r:1", queries=queries)
        row = {"messages": [{"role": "user", "content": "?"}]} | more
        completions = (drawn,) * run.section(RLConfig).num_generations
        groups.append(Group(number, completions, Prompt(sample, row, "r:1")))
    dp = engine.groups.pg.dp
    with scorer._runner as runner:
        runner.score = remember
        scorer.score(Rollout(tuple(groups[dp.rank() :: dp.size()]), (), 0.0))
    return given


def test_a_reward_gets_the_boxes_of_the_answer_it_judges(ranks, look_scenes):
    """Not those of answers before it. A row without the key has None, on whatever replica."""
    run = looking_run(look_scenes)
    assert ranks(1, on_rank_boxes, run) == [[SECOND, None]]
    assert ranks(2, on_rank_boxes, run) == [[SECOND], [None]]


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


def test_boxes_are_no_loss_of_reinforcement(look_scenes):
    run = looking_run(look_scenes)
    query_settings(run.model).query_box_loss_coeff = 1.0
    with pytest.raises(ConfigError, match="query_box_loss_coeff is 1.0; allowed: 0 with objective"):
        validate(run, 1)

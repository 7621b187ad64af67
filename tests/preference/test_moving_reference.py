"""Preference pairs with a reference that follows the policy: resuming, copies, references by name.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from megatron_mm.config import RunConfig
from megatron_mm.errors import CheckpointError
from support.cascades import with_cascade
from support.pair_runs import on_rank_save, on_rank_steps, pairs_run, pairs_trainer, write_pairs
from support.trainers import PP2, digits_run

MOVES = dict(sync_ref_model=True, ref_model_sync_steps=2, lr=1e-3)


@pytest.fixture(scope="module")
def rows(scenes, tmp_path_factory):
    return write_pairs(scenes, tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="module")
def start(ranks, scenes, tmp_path_factory):
    """A checkpoint of supervised training that has taken no step."""
    folder = tmp_path_factory.mktemp("start")
    ranks(1, on_rank_save, digits_run(scenes, valid_data=None), folder)
    return folder


def begun(scenes, rows, start, **settings) -> RunConfig:
    return pairs_run(scenes, rows, load=str(start), finetune=True, **(MOVES | settings))


@pytest.mark.parametrize(("size", "sizes"), [(1, {}), (2, PP2), (2, {})])
def test_a_run_goes_on_to_the_bit(ranks, scenes, rows, start, tmp_path, size, sizes):
    """The average among it, which needs the weights of the start no more; on another layout as
    nearly as any losses are the same."""
    begin = tmp_path / "begin"
    shutil.copytree(start, begin)
    whole = ranks(size, on_rank_save, begun(scenes, rows, begin, **sizes), tmp_path / "whole", 4)
    first = ranks(size, on_rank_save, begun(scenes, rows, begin, **sizes), tmp_path / "cut", 3)
    shutil.rmtree(begin)
    other = ranks(2, on_rank_steps, goes_on(scenes, rows, tmp_path / "cut", **PP2), 1)
    rest = ranks(size, on_rank_save, goes_on(scenes, rows, tmp_path / "cut", **sizes),
                 tmp_path / "cut", 1)  # fmt: skip
    for (steps, end), (before, _), (after, new_end) in zip(whole, first, rest, strict=True):
        assert steps == before + after and end == new_end
    for (step,) in other:
        for name in ("rewards/margins", "logps/chosen", "train/dpo_loss"):
            assert step[name] == pytest.approx(whole[0][0][3][name], rel=1e-4), name
    plain = begun(scenes, rows, start, sync_ref_model=False, **sizes)
    still = ranks(size, on_rank_steps, plain, 4)[0]
    assert still[:2] == whole[0][0][:2]
    assert abs(still[3]["rewards/margins"]) > 1.5 * abs(whole[0][0][3]["rewards/margins"])


def goes_on(scenes, rows, folder: Path, **settings) -> RunConfig:
    return pairs_run(scenes, rows, load=str(folder), **(MOVES | settings))


def test_a_reference_that_is_copied_every_step_is_the_policy(ranks, scenes, rows, start):
    """At equal weights losses are those of the beginning, to fp32 rounding."""
    copies = dict(ref_model_mixup_alpha=1.0, ref_model_sync_steps=1, loss_type=["sigmoid"])
    for step in ranks(1, on_rank_steps, begun(scenes, rows, start, **copies), 3)[0]:
        assert step["train/dpo_loss"] == pytest.approx(math.log(2), rel=1e-7)
        assert abs(step["rewards/margins"]) <= 1e-9


def test_the_starting_weights_move_as_a_reference_by_name(ranks, scenes, rows, start):
    absent = ranks(1, on_rank_steps, begun(scenes, rows, start), 4)[0]
    named = ranks(1, on_rank_steps, begun(scenes, rows, start, dpo_ref_load=str(start)), 4)[0]
    assert absent == named


def on_rank_held(run: RunConfig) -> list[float]:
    """The state of every gate of a second hop in the reference, after steps that close the gates of
    the policy, and in the policy."""
    trainer = pairs_trainer(run)
    for _ in range(2):
        trainer.step()
    sets = trainer.source.sets
    own = dict(trainer.engine.chunks[0].named_parameters())
    held = sets._sets["reference"].weights
    return [float(of[name]) for of in (held, own) for name in own if name.endswith(".hard")]


def test_the_reference_hands_over_as_the_start_did(ranks, scenes, rows):
    """Though what tells a hard gate from a soft one never learns."""
    run = with_cascade(pairs_run(scenes, rows, train_iters=4), delegate_hard_from=0.5)
    assert ranks(1, on_rank_held, run)[0] == [0.0, 0.0, 1.0, 1.0]


def on_rank_error(run: RunConfig) -> str:
    try:
        pairs_trainer(run)
    except CheckpointError as error:
        return str(error)
    return "nothing"


def test_a_run_whose_reference_moved_is_not_resumed_with_another(
    ranks, scenes, rows, start, tmp_path
):
    ranks(1, on_rank_save, begun(scenes, rows, start), tmp_path, 2)
    for said in ranks(1, on_rank_error, goes_on(scenes, rows, tmp_path, sync_ref_model=False)):
        assert "are unexpected (first moving.reference." in said and "set sync_ref_model" in said

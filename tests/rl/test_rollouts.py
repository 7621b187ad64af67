"""Rollouts: routes of rows that are filled again, rows and rewards that are left out, the reference
model, saves between rollouts that are shorter than planned.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from megatron_mm.config import RunConfig, validate
from megatron_mm.config.settings import DataPhase
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.engine.weight_set import WeightSet
from megatron_mm.errors import DataError
from megatron_mm.evaluation.questions import EvalSet
from megatron_mm.generation.generate import Prompts, generate
from megatron_mm.generation.sampling import Sampling
from megatron_mm.parallel import groups
from megatron_mm.rl.reference import REFERENCE, weights_of
from megatron_mm.rl.rollout.columns import Columns
from megatron_mm.rl.rollout.prompts import PromptLoader
from megatron_mm.rl.settings import RLConfig
from megatron_mm.train import loop
from megatron_mm.train.trainer import Trainer
from support.grpo_runs import grpo_run, trainer_of
from support.trainers import PP2, digits_run
from support.weights import random_engine

ASKED = (0, 12, 8, 5, 20, 3, 17)


def on_rank_routes(run: RunConfig, rows: int, temperature: float) -> list[torch.Tensor]:
    """Returns the routes of this rank's layers, of all completions."""
    engine = random_engine(run)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    questions = EvalSet(run.data.valid_data, run, tokenizer)
    found = generate(
        engine,
        Prompts(lambda i: questions[ASKED[i]].sample, ASKED),
        Sampling((-1,), 5, seed=3, router_temperature=temperature),
        num_generations=2,
        max_num_seqs=rows,
        pad_id=tokenizer.pad_id,
        record_routes=True,
    )
    return [completion.routes_SLk for group in found for completion in group]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("size", "sizes"), [(1, {}), (2, PP2)])
def test_routes_stay_those_of_their_completion(ranks, scenes, size, sizes, temperature):
    """A row that is filled again must change neither the routes nor the draws of a completion."""
    run = digits_run(scenes, **sizes)
    together, apart = (ranks(size, on_rank_routes, run, rows, temperature) for rows in (64, 2))
    for one, other in zip(together, apart, strict=True):
        assert len(one) == 2 * len(ASKED)
        for routes, same in zip(one, other, strict=True):
            assert routes.shape == same.shape
            # In another batch rounding may send a token to another expert, seldom.
            assert (routes == same).double().mean() > 0.98


# ---- rows ----


def rows_with(scenes: Path, folder: Path, changes: list[dict], count: int = 16) -> str:
    """Writes the scenes' first rows with the first few changed; returns the path."""
    rows = [json.loads(line) for line in (scenes / "mix.jsonl").read_text().splitlines()[:count]]
    for row, change in zip(rows, changes, strict=False):
        row |= change
    (folder / "images").symlink_to(scenes / "images")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_on(path: str, scenes, **settings) -> RunConfig:
    run = grpo_run(scenes, **settings)
    run.data.train_data = [DataPhase(path)]
    return run


def on_rank_step(run: RunConfig) -> tuple[dict, list[dict], str]:
    """Returns metrics and table of a step, and what it wrote to stderr; without a step, the
    error."""
    said = io.StringIO()
    trainer = trainer_of(run)
    try:
        with contextlib.redirect_stderr(said):
            metrics = trainer.step()
        return metrics, trainer.source.table, said.getvalue()
    except DataError as error:
        return {}, [], str(error)
    finally:
        trainer.source.close()


@pytest.mark.parametrize("sizes", [PP2, {}])
def test_a_row_whose_skill_is_no_text_is_an_error_on_every_rank(ranks, scenes, tmp_path, sizes):
    path = rows_with(scenes, tmp_path, [{"skill": 7}] * 16)
    for _, _, error in ranks(2, on_rank_step, run_on(path, scenes, **sizes)):
        assert "rows.jsonl:" in error and "skill 7 is not text" in error


def test_a_prompt_without_a_question_is_answered(ranks, scenes, tmp_path):
    """A conversation may begin with the answer, or with what the system says."""
    bare = [
        {"messages": [{"role": "assistant", "content": "7"}], "images": []},
        {"messages": [{"role": "system", "content": "Say 7."}], "images": []},
    ]
    path = rows_with(scenes, tmp_path, bare * 8)
    found = ranks(2, on_rank_step, run_on(path, scenes, **PP2))
    assert all(metrics["rollout/generated"] == 32 for metrics, _, _ in found)
    assert {row["question"] for row in found[0][1]} == {""}


def test_what_is_left_out_is_counted_and_said(ranks, scenes, tmp_path):
    path = rows_with(scenes, tmp_path, [{"images": ["gone.png"]}] * 5)
    run = run_on(path, scenes, on_bad_sample="skip", rollout_batch_size=16, global_batch_size=64)
    run.section(RLConfig).reward_funcs = ["support.even.even", "support.even.fails_on_short"]
    metrics, _, said = ranks(1, on_rank_step, run)[0]
    assert metrics["train/skipped_samples"] == 5 and metrics["rollout/generated"] == 44
    assert "left out: " in said and "gone.png" in said
    assert "rewards failed: " in said and "fails_on_short" in said and "odd end" in said


# ---- reference ----


def on_rank_compared(run: RunConfig, folder: Path) -> list[float]:
    """Returns the divergence from the weights that the run began with, step by step."""
    trainer = trainer_of(run)
    trainer.run.checkpoint.save = str(folder)
    trainer.save()
    trainer.saver.finish()
    held = WeightSet.of(weights_of(trainer.engine, str(folder)))
    trainer.source.sets.add(REFERENCE, held)
    try:
        return [trainer.step()["kl"] for _ in range(4)]
    finally:
        trainer.source.close()


def test_gathers_under_way_leave_the_reference_alone(ranks, scenes, tmp_path):
    settings = dict(lr=1e-2, num_iterations=1)
    found = {}
    for overlap in (False, True):
        run = grpo_run(scenes, overlap_param_gather=overlap, overlap_grad_reduce=True, **settings)
        found[overlap] = ranks(2, on_rank_compared, run, tmp_path / str(overlap))[0]
    assert found[True] == found[False]
    assert found[True][0] <= 1e-9 < 1e-4 < found[True][2]


# ---- saving ----


def on_rank_train(run: RunConfig) -> list[tuple[int, bool]]:
    """Returns for every save its number of steps, and whether it was between rollouts."""
    validate(run, dist.get_world_size())
    # The pool's ranks are daemons, which may not start reward workers.
    multiprocessing.current_process()._config["daemon"] = False
    saves, save = [], Trainer.save

    def noted(trainer):
        saves.append((trainer.iteration, trainer.source.between))
        return save(trainer)

    Trainer.save = noted
    try:
        loop.train(run, groups.build(run.parallel))
    finally:
        Trainer.save = save  # the rank lives on
    return saves


def test_a_short_rollout_does_not_shift_saves_into_another(ranks, scenes, tmp_path):
    """The first rollout has so many bad rows among its 8 that no second step can be made of it."""
    path = rows_with(scenes, tmp_path, [{"images": ["gone.png"]}] * 5, count=8)
    run = run_on(path, scenes, on_bad_sample="skip", train_iters=8, save_interval=2)
    run.data.train_data = [DataPhase(path, 8), DataPhase(str(scenes / "mix.jsonl"))]
    run.checkpoint.save, run.logging.output_dir = str(tmp_path / "saved"), str(tmp_path / "out")
    (saves,) = ranks(1, on_rank_train, run)
    assert saves[:3] == [(3, True), (5, True), (7, True)] and saves[-1][0] == 8


# ---- columns ----


def on_rank_columns(run: RunConfig) -> list[list[str]]:
    """Two replicas, whose rows have columns of their own; none in the last round."""
    made = groups.build(run.parallel)
    columns, rank = Columns(), dist.get_rank()
    rounds = [{"a"}, {"b"} if rank else {"a"}, set()]
    found = [[*columns.with_round(made, mine)] for mine in rounds]
    resumed = Columns({"of the data"})
    resumed.expect(columns.names)
    return [*found, [*resumed.with_round(made, set())]]


def test_a_column_that_a_row_has_had_stays(ranks, scenes):
    """Else a reward would miss its argument in a round whose rows all lack it."""
    expected = [["a"], ["a", "b"], ["a", "b"], ["a", "b", "of the data"]]
    assert ranks(2, on_rank_columns, digits_run(scenes)) == [expected] * 2


def test_prompts_know_the_columns_of_every_file(scenes, tmp_path):
    """The first row of JSONL and all of parquet, in our names for verl's."""
    asked = [{"role": "user", "content": "1?"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": asked}) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": asked, "mine": 1}) + "\n{\n")
    verl = {"prompt": asked, "reward_model": {"ground_truth": "1"}, "data_source": "sums"}
    pq.write_table(pa.Table.from_pylist([verl]), tmp_path / "c.parquet")
    run = grpo_run(scenes)
    run.data.train_data = [
        DataPhase(str(tmp_path / "*.jsonl"), samples=2),
        DataPhase(str(tmp_path / "c.parquet")),
    ]
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    loader = PromptLoader(run, tokenizer, data_parallel_rank=0, data_parallel_size=1)
    assert {*loader.columns.names} - {"reward_model", "data_source"} == {
        *("messages", "mine", "ground_truth", "skill"),
    }
    again = PromptLoader(run, tokenizer, data_parallel_rank=0, data_parallel_size=1)
    again.load_state_dict(loader.state_dict() | {"columns": [*loader.columns.names, "rare"]})
    assert {*again.columns.names} == {*loader.columns.names, "rare"}
    again.load_state_dict({"consumed_samples": 3})  # of a checkpoint from before
    assert again.consumed_samples == 3

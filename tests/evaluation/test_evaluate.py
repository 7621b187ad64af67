"""Evaluation: every question once, the same on every layout, and nothing disturbed.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from megatron_mm.config import RunConfig
from megatron_mm.data.files.rows import Rows
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.errors import DataError
from megatron_mm.evaluation.evaluate import evaluate
from megatron_mm.evaluation.held_out import held_out_losses
from megatron_mm.evaluation.scoring import SCORERS, score
from megatron_mm.parallel import groups
from megatron_mm.train.trainer import Trainer
from support.fingerprints import parameter_hash
from support.trainers import LAYOUTS, digits_run
from support.weights import random_engine

QUESTIONS = 11  # does not divide by replicas, stages or batch


def on_rank_evaluate(run: RunConfig) -> tuple[dict, list[dict], bool]:
    engine = random_engine(run)
    engine.training(True)
    results, records = evaluate(engine, load_tokenizer(run.data.tokenizer_model))
    return results, records, engine.models[0].training


def evaluation_run(scenes, **settings) -> RunConfig:
    return digits_run(
        scenes, eval_samples=QUESTIONS, eval_batch_size=3, max_new_tokens=3, **settings
    )


@pytest.fixture(scope="module")
def one_rank_evaluation(ranks, scenes):
    return ranks(1, on_rank_evaluate, evaluation_run(scenes))[0]


@pytest.mark.parametrize("name", ["PP2", "DP2", "EP2", "TP2"])
def test_every_question_is_scored_once_on_every_layout(ranks, scenes, one_rank_evaluation, name):
    expected, expected_records, _ = one_rank_evaluation
    size, sizes = LAYOUTS[name]
    for results, records, training in ranks(
        size, on_rank_evaluate, evaluation_run(scenes, **sizes)
    ):
        assert [record["index"] for record in records] == list(range(QUESTIONS))
        assert records == expected_records and results == expected
        assert training  # as it was before


def test_results_follow_from_the_records(one_rank_evaluation, scenes):
    results, records, _ = one_rank_evaluation
    rows = Rows(scenes / "valid.jsonl")
    assert sum(result["n"] for result in results.values()) == QUESTIONS
    for record in records:
        row = rows[record["index"]]
        assert record["truth"] == row["ground_truth"]
        assert record["score"] == score(row["scorer"], record["prediction"], row["ground_truth"])
        direct = row["form"] == "direct"
        assert record["key"] == (row["skill"] if direct else f"{row['skill']}/{row['form']}")
    for key, result in results.items():
        scores = [record["score"] for record in records if record["key"] == key]
        assert (result["accuracy"], result["n"]) == (sum(scores) / len(scores), len(scores))


def test_chance_is_the_best_constant_answer(ranks, scenes, tmp_path):
    """Four questions whose answers are 3, 3, 5 and 3, and a second kind all alike."""
    (tmp_path / "images").symlink_to(scenes / "images")
    kinds = [("ocr", truth) for truth in "3353"] + [("count", "7")] * 2
    random.Random(0).shuffle(kinds)
    rows = [
        {
            "messages": [{"role": "user", "content": f"<image>How many {n}?"}],
            "images": ["images/valid_000000.png"],
            "ground_truth": truth,
            "skill": skill,
        }
        for n, (skill, truth) in enumerate(kinds)
    ]
    path = tmp_path / "valid.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = evaluation_run(scenes, valid_data=str(path))
    results, _, _ = ranks(1, on_rank_evaluate, run)[0]
    assert {key: (r["chance"], r["n"]) for key, r in results.items()} == {
        "ocr": (0.75, 4),
        "count": (1.0, 2),
    }


def on_rank_error(run: RunConfig, fail_on: int) -> str:
    """Evaluates with a scorer that fails on one rank only; returns the error."""

    def mine(prediction, truth):
        return 1 / abs(torch.distributed.get_rank() - fail_on)

    SCORERS["mine"] = mine if fail_on >= 0 else lambda prediction, truth: 1
    try:
        evaluate(random_engine(run), load_tokenizer(run.data.tokenizer_model))
    except DataError as error:
        return str(error)
    finally:
        del SCORERS["mine"]
    return "nothing"


def questions_with(scenes, folder, change: dict) -> str:
    """Writes four questions, the last of them changed; returns the path."""
    (folder / "images").symlink_to(scenes / "images")
    rows = [json.loads(line) for line in (scenes / "valid.jsonl").read_text().splitlines()[:4]]
    rows[-1] |= change
    (folder / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "valid.jsonl")


def test_a_scorer_that_fails_on_one_rank_is_the_error_of_all(ranks, scenes, tmp_path):
    path = questions_with(scenes, tmp_path, {})
    rows = [json.loads(line) | {"scorer": "mine"} for line in Path(path).read_text().splitlines()]
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = evaluation_run(scenes, valid_data=path)
    assert ranks(2, on_rank_error, run, -1) == ["nothing"] * 2
    for error in ranks(2, on_rank_error, run, 1):
        assert error == "scorer 'mine' failed: ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ground_truth": [7]}, "valid.jsonl:4: ground_truth is a list"),
        ({"scorer": "nobody"}, "valid.jsonl:4: scorer 'nobody' is unknown"),
        (
            {"messages": [{"role": "user", "content": "<image>?"}], "ground_truth": None},
            ":4: no answer",
        ),
        ({"messages": []}, "valid.jsonl:4: 'messages' must be a list"),
    ],
)
def test_a_question_that_cannot_be_judged_is_known_before_training(
    ranks, scenes, tmp_path, change, message
):
    """The last rows of the file are asked hours later."""
    run = evaluation_run(scenes, valid_data=questions_with(scenes, tmp_path, change))
    for error in ranks(2, on_rank_open, run):
        assert message in error


def on_rank_open(run: RunConfig) -> str:
    try:
        Trainer(run, groups.build(run.parallel))
    except DataError as error:
        return str(error)
    return "nothing"


def on_rank_evaluate_between(run: RunConfig, between: bool) -> tuple[list, list | None, str]:
    """Metrics of three steps, records of an evaluation after the second, parameters."""
    trainer = Trainer(run, groups.build(run.parallel))
    metrics, records = [], None
    for step in range(3):
        if between and step == 2:
            held_out_losses(trainer.engine, trainer.tokenizer)
            _, records = evaluate(trainer.engine, trainer.tokenizer)
        found = trainer.step()
        metrics.append({name: found[name] for name in found if name != "perf/iteration_time"})
    return metrics, records, parameter_hash(trainer.engine)


@pytest.mark.parametrize("name", ["PP2", "DP2"])
def test_an_evaluation_between_steps_disturbs_nothing(ranks, scenes, name):
    size, sizes = LAYOUTS[name]
    run = evaluation_run(scenes, **sizes)
    with_one = ranks(size, on_rank_evaluate_between, run, True)
    without = ranks(size, on_rank_evaluate_between, run, False)
    for a, b in zip(with_one, without, strict=True):
        assert (a[0], a[2]) == (b[0], b[2])
    if name == "DP2":  # parameters arrive late, and yet before they are evaluated
        run = evaluation_run(scenes, overlap_grad_reduce=True, overlap_param_gather=True)
        late = ranks(size, on_rank_evaluate_between, run, True)
        assert [rank[1] for rank in late] == [rank[1] for rank in with_one]

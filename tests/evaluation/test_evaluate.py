"""Evaluation: every question once, the same on every layout, and nothing disturbed.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

import json
import random

import pytest

from megatron_mm.config import RunConfig
from megatron_mm.data.files.rows import Rows
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.evaluation.evaluate import evaluate
from megatron_mm.evaluation.scoring import score
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


def on_rank_evaluate_between(run: RunConfig, between: bool) -> tuple[list, list | None, str]:
    """Metrics of three steps, records of an evaluation after the second, parameters."""
    trainer = Trainer(run, groups.build(run.parallel))
    metrics, records = [], None
    for step in range(3):
        if between and step == 2:
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

"""The loss of held-out answers: by a slow loop, the same on every layout, and which rows have one.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from pathlib import Path

import pytest

from megatron_mm.config import RunConfig
from megatron_mm.data.collate import collate
from megatron_mm.data.files.rows import Rows
from megatron_mm.data.sample import SampleBuilder
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.evaluation.held_out import _plan, held_out_losses, mean_loss
from megatron_mm.evaluation.questions import EvalSet
from megatron_mm.evaluation.scoring import result_key
from megatron_mm.parallel import groups
from megatron_mm.report.metrics_log import read_metrics
from megatron_mm.train.loop import train
from support.trainers import LAYOUTS, digits_run
from support.weights import random_engine

ROWS = 11  # does not divide by replicas, stages or microbatches
# Relative, of means of fp32 log-probabilities around 6: layouts add in other orders. 4e-8 was
# measured; a token left out changes a mean of some twenty by more than 1e-4.
TOLERANCE = 1e-6


def held_out_run(scenes, **settings) -> RunConfig:
    sizes = {"micro_batch_size": 2, "global_batch_size": 8, "eval_samples": ROWS}
    return digits_run(scenes, **(sizes | settings))


def on_rank_losses(run: RunConfig, stopped: bool = False) -> tuple[dict, bool]:
    engine = random_engine(run)
    engine.training(True)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    losses = held_out_losses(engine, tokenizer, lambda: stopped)
    return losses, engine.models[0].training


def on_rank_slow_losses(run: RunConfig) -> dict:
    """Row by row, token by token, from whole logits."""
    engine, tokenizer = random_engine(run), load_tokenizer(run.data.tokenizer_model)
    builder, rows = SampleBuilder(run, tokenizer), Rows(Path(run.data.valid_data))
    found = defaultdict(list)
    for index in range(ROWS):
        row = rows[index]
        sample = builder.training(row, rows.where(index), rows.folder)
        batch = collate([sample], settings=builder.settings, pad_id=tokenizer.pad_id)
        (logits_TV,) = engine.forward(
            [batch], None, lambda predictions, *_, **__: predictions.logits()
        )
        for logits_V, label, counts in zip(
            logits_TV, sample.labels_T.tolist(), sample.loss_mask_T.tolist(), strict=True
        ):
            if counts:
                found[result_key(row)].append(-float(logits_V.log_softmax(0)[label]))
    return {key: {"lm_loss": sum(x) / len(x), "answer_tokens": len(x)} for key, x in found.items()}


def _logits(predictions, *_, **__):
    return predictions.logits()


@pytest.fixture(scope="module")
def slow_losses(ranks, scenes):
    return ranks(1, on_rank_slow_losses, held_out_run(scenes))[0]


def test_packs_of_held_out_rows_have_no_more_tiles_than_allowed(scenes):
    """A scene has 10 tiles; a row that exceeds the limit is read alone."""
    tokenizer = load_tokenizer(str(scenes / "tokenizer.model"))

    def counts(most: int | None) -> list[int]:
        run = held_out_run(scenes, packing=True, micro_batch_size=4)
        run.data.max_pack_tiles = most
        questions = EvalSet(run.data.valid_data, run, tokenizer)
        chunks, left_out = _plan(run, questions)
        assert not left_out and sorted(i for c in chunks for i in c) == [*range(len(questions))]
        return [sum(questions.answered_size(i).tiles for i in chunk) for chunk in chunks]

    assert max(counts(None)) > 20
    assert max(counts(20)) == 20 and {*counts(5)} == {10}


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packing"])
@pytest.mark.parametrize(
    "name",
    ["one rank", "TP2", "PP2", "DP2", "EP2", "CP2", "PP2xVPP2", "PP2, encoder beside"],
)
def test_losses_are_those_of_a_slow_loop_on_every_layout(ranks, scenes, slow_losses, name, packing):
    size, sizes = LAYOUTS[name]
    run = held_out_run(scenes, packing=packing, **sizes)
    assert len(slow_losses) > 3
    for losses, training in ranks(size, on_rank_losses, run):
        assert losses.keys() == slow_losses.keys()
        for key, expected in slow_losses.items():
            assert losses[key]["answer_tokens"] == expected["answer_tokens"]
            assert losses[key]["lm_loss"] == pytest.approx(expected["lm_loss"], rel=TOLERANCE)
        assert training  # as it was before


def test_the_mean_is_over_tokens(slow_losses):
    total = sum(of["lm_loss"] * of["answer_tokens"] for of in slow_losses.values())
    tokens = sum(of["answer_tokens"] for of in slow_losses.values())
    assert mean_loss(slow_losses) == pytest.approx(total / tokens)
    assert mean_loss({"ocr": {"accuracy": 1.0}}) is None and mean_loss({}) is None


def changed(scenes, folder: Path, changes: dict[int, dict]) -> str:
    """Writes six held-out rows, some of them changed; returns the path."""
    (folder / "images").symlink_to(scenes / "images")
    rows = [json.loads(line) for line in (scenes / "valid.jsonl").read_text().splitlines()[:6]]
    for number, row in enumerate(rows):
        row |= {"skill": str(number), "form": "direct"} | changes.get(number, {})
    path = folder / "valid.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def on_rank_warnings(run: RunConfig) -> tuple[dict, list[str]]:
    said: list[str] = []
    logger = logging.getLogger("megatron_mm.evaluation.held_out")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    try:
        return on_rank_losses(run)[0], said
    finally:
        logger.removeHandler(handler)


def test_rows_without_an_answer_that_fits_have_no_loss(ranks, scenes, tmp_path):
    question = {"role": "user", "content": "<image>How many 3?"}
    long = {"role": "assistant", "content": "3 " * 200}
    unlearnt = {"role": "assistant", "content": "3", "weight": 0}
    path = changed(
        scenes,
        tmp_path,
        {
            0: {"messages": [question, long]},
            2: {"messages": [question]},
            3: {"messages": [question, unlearnt]},
        },
    )
    for losses, said in ranks(2, on_rank_warnings, held_out_run(scenes, valid_data=path)):
        assert sorted(losses) == ["1", "4", "5"]
        assert len(said) == 1 and said[0].startswith("2 rows have no loss: ")
        assert "valid.jsonl:1: " in said[0] and "seq_length" in said[0]
    (tmp_path / "none").mkdir()
    path = changed(scenes, tmp_path / "none", {n: {"messages": [question]} for n in range(6)})
    assert ranks(1, on_rank_losses, held_out_run(scenes, valid_data=path))[0][0] == {}


def test_a_stop_ends_the_measurement(ranks, scenes):
    for losses, training in ranks(2, on_rank_losses, held_out_run(scenes), True):
        assert losses == {} and training


def on_rank_train(run: RunConfig) -> None:
    train(run, groups.build(run.parallel))


def test_a_run_logs_them_beside_accuracies(ranks, scenes, tmp_path):
    run = held_out_run(
        scenes, train_iters=4, eval_interval=2, output_dir=str(tmp_path), max_new_tokens=2
    )
    run.logging.tensorboard, run.logging.wandb_mode = False, "disabled"
    ranks(2, on_rank_train, run)
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "valid/lm_loss" in r]
    assert [record["iteration"] for record in records] == [2, 4]
    first, last = (record["valid/lm_loss"] for record in records)
    assert last < first  # four steps at lr 1e-3 take more than 0.1 off
    results = json.loads((tmp_path / "results.json").read_text())["skills"]
    assert mean_loss(results) == pytest.approx(last)
    for key, of in results.items():
        assert records[-1][f"valid/lm_loss/{key}"] == of["lm_loss"]
        assert records[-1][f"accuracy/{key}"] == of["accuracy"]

"""How rows reach the ranks, and how all of them learn of a bad one before they compute."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import torch
from trainers import LAYOUTS, PP2, batch_hash, digits_run, new_trainer, parameters

from megatron_mm.data.errors import DataError
from megatron_mm.parallel import groups
from megatron_mm.train.feed import receive
from megatron_mm.train.loop import Trainer

SEED = 1
GLOBAL_BATCH = 4  # rows of a file here, so that one step reads each of them once


def row(scenes, question="<image>How many 3?", answer="2", image="images/train_000000.png"):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ],
        "images": [str(scenes / image)] if image and image.startswith("images") else [],
    }


def bad_row(scenes, kind: str) -> dict:
    good = row(scenes)
    if kind == "missing image":
        return good | {"images": ["none.png"]}
    if kind == "marks":
        return row(scenes, question="<image> and <image>: how many 3?")
    return row(scenes, answer="1 " * 200)


BAD = {
    "missing image": "does not exist",
    "marks": "2 <image> marks but 1 images",
    "too long": "seq_length is 128",
}


def write(folder, rows) -> str:
    """The n-th of `rows` is the n-th that the first epoch reads."""
    order = np.random.default_rng([SEED, 0, 0]).permutation(len(rows))
    lines = [""] * len(rows)
    for place, number in enumerate(order):
        lines[number] = json.dumps(rows[place])
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def where(path, place: int, count: int = GLOBAL_BATCH) -> str:
    order = np.random.default_rng([SEED, 0, 0]).permutation(count)
    return f"{path}:{order[place] + 1}"


@pytest.fixture
def data(tmp_path, scenes):
    """data(row, ...) -> path; images may lie beside the rows or in the scenes' folder."""
    (tmp_path / "images").symlink_to(scenes / "images")

    def make(*rows):
        for r in rows:
            r["images"] = [name.removeprefix(f"{scenes}/") for name in r["images"]]
        return write(tmp_path, rows)

    return make


# ---- bad rows ----


def on_rank_bad_row(run) -> dict:
    trainer = new_trainer(run)
    started = []
    trainer.engine.forward_backward = lambda *args: started.append(args)
    try:
        trainer.step()
        error = None
    except DataError as problem:
        error = str(problem)
    return {"error": error, "started": len(started), "iteration": trainer.iteration}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", ["one rank", "TP2", "PP2", "DP2"])
def test_a_bad_row_is_the_same_error_on_every_rank(ranks, scenes, data, name, kind):
    size, sizes = LAYOUTS[name]
    # The last row of the step: with two replicas the second one reads it, alone.
    path = data(*(row(scenes) for _ in range(GLOBAL_BATCH - 1)), bad_row(scenes, kind))
    found = ranks(size, on_rank_bad_row, digits_run(scenes, path, **sizes))
    for rank in found:
        assert rank == found[0]
    assert found[0]["error"].startswith(f"{where(path, GLOBAL_BATCH - 1)}: ")
    assert BAD[kind] in found[0]["error"] and "\n" not in found[0]["error"]
    assert (found[0]["started"], found[0]["iteration"]) == (0, 0)


def test_of_two_bad_rows_the_first_replicas_is_told(ranks, scenes, data):
    rows = [bad_row(scenes, "marks"), row(scenes), row(scenes), bad_row(scenes, "missing image")]
    path = data(*rows)
    found = ranks(2, on_rank_bad_row, digits_run(scenes, path))
    assert [rank["error"].startswith(f"{where(path, 0)}: ") for rank in found] == [True, True]


def on_rank_construction(run) -> str:
    try:
        Trainer(run, groups.build(run.parallel))
    except DataError as problem:
        return str(problem)
    return "no error"


@pytest.mark.parametrize("name", ["one rank", "PP2", "DP2"])
def test_an_empty_dataset_is_one_error_on_every_rank(ranks, scenes, tmp_path, name):
    size, sizes = LAYOUTS[name]
    (tmp_path / "empty.jsonl").write_text("\n")
    run = digits_run(scenes, tmp_path / "empty.jsonl", **sizes)
    expected = f"{tmp_path}/empty.jsonl: 0 rows; a dataset needs at least 1"
    assert ranks(size, on_rank_construction, run) == [expected] * size


def test_other_settings_of_the_data_are_one_error_on_every_rank(ranks, scenes):
    for settings, words in (
        (dict(tokenizer_model=""), "tokenizer_model is not set"),
        (dict(tokenizer_model="nowhere"), "'nowhere' is neither"),
        (dict(vocab_size=64), "the model's vocab_size is 64"),
        (dict(train_data=[]), "train_data has 0 phases"),
    ):
        first, second = ranks(2, on_rank_construction, digits_run(scenes, **PP2, **settings))
        assert words in first and first == second


# ---- skipping ----


def on_rank_train(run, steps: int = 2) -> tuple[list[dict], set[str]]:
    """The metrics of each step, and the parameters that are no longer as they were."""
    trainer = new_trainer(run)
    before = parameters(trainer)
    metrics = [trainer.step() for _ in range(steps)]
    after = parameters(trainer)
    return metrics, {name for name in after if not torch.equal(after[name], before[name])}


@pytest.mark.parametrize("name", ["one rank", "TP2", "PP2", "DP2"])
@pytest.mark.parametrize("bad", [(3,), (2, 3), (0, 2)])
def test_skipped_rows_are_counted_and_training_goes_on(ranks, scenes, data, name, bad):
    """(2, 3) are a whole microbatch, and with two replicas all that the second one has."""
    size, sizes = LAYOUTS[name]
    kinds = list(BAD)
    rows = [bad_row(scenes, kinds[i % 3]) if i in bad else row(scenes) for i in range(GLOBAL_BATCH)]
    run = digits_run(scenes, data(*rows), on_bad_sample="skip", **sizes)
    for metrics, _ in ranks(size, on_rank_train, run):
        for step in metrics:  # the second step reads the same rows in another order
            assert step["skipped samples"] == len(bad)
            assert math.isfinite(step["lm loss"]) and step["lm loss"] > 0
            assert math.isfinite(step["grad norm"]) and step["grad norm"] > 0
            assert math.isfinite(step["load_balancing_loss"])
        assert metrics[1]["consumed samples"] == 2 * GLOBAL_BATCH


def test_skipping_rows_is_training_without_them(ranks, scenes, data):
    """Not only finite: the loss and the gradient of the rows that are left."""
    rows = [row(scenes, question=f"<image>How many {n}?", answer=str(n)) for n in range(4)]
    kept = [rows[0], rows[1], bad_row(scenes, "marks"), bad_row(scenes, "too long")]
    run = digits_run(scenes, data(*kept), on_bad_sample="skip")
    skipping = ranks(1, on_rank_train, run, 1)[0][0][0]
    run = digits_run(scenes, data(*rows[:2]), global_batch_size=2)
    plain = ranks(1, on_rank_train, run, 1)[0][0][0]
    for name in ("lm loss", "grad norm", "tokens"):
        # Two of the four rows, perhaps in the other order: sums of fp32 in another order.
        assert skipping[name] == pytest.approx(plain[name], rel=1e-5), name


@pytest.mark.parametrize("name", ["one rank", "DP2"])
def test_a_step_of_skipped_rows_alone_changes_nothing_but_the_count(ranks, scenes, data, name):
    size, sizes = LAYOUTS[name]
    rows = [bad_row(scenes, "marks") for _ in range(GLOBAL_BATCH)]
    run = digits_run(scenes, data(*rows), on_bad_sample="skip", weight_decay=0.0, **sizes)
    for metrics, changed in ranks(size, on_rank_train, run, 1):
        assert metrics[0]["skipped samples"] == GLOBAL_BATCH and metrics[0]["tokens"] == 0
        assert (metrics[0]["lm loss"], metrics[0]["grad norm"]) == (0.0, 0.0)
        assert not changed


# ---- text beside images ----


@pytest.mark.parametrize("name", ["one rank", "TP2", "PP2", "DP2", "DP2 overlapped"])
def test_text_only_rows_train_beside_images(ranks, scenes, data, name):
    """The first microbatch, one replica's whole share, has no image. With overlap, a gradient
    that never comes is an error in megatron-core: the ViT must take part all the same."""
    size, sizes = LAYOUTS[name.split()[0] if name != "one rank" else name]
    if name.endswith("overlapped"):
        sizes = sizes | dict(overlap_grad_reduce=True, overlap_param_gather=True)
    text = [row(scenes, question=f"How many {n}?", image=None) for n in range(2)]
    run = digits_run(scenes, data(*text, row(scenes), row(scenes)), **sizes)
    expected = ranks(1, on_rank_train, digits_run(scenes, run.data.train_data[0].path), 2)[0][0]
    for metrics, _ in ranks(size, on_rank_train, run):
        for step, alone in zip(metrics, expected, strict=True):
            # As in test_loop.LOSS_TOLERANCE.
            assert step["lm loss"] == pytest.approx(alone["lm loss"], rel=1e-5)
            assert step["tokens"] == alone["tokens"]


# ---- sharing ----


def on_rank_receive(run) -> dict:
    made = groups.build(run.parallel)
    trainer = Trainer(run, made)
    position = trainer.loader.consumed_samples
    own = trainer.loader.next_batch()  # any rank can read; only the reader's is handed out
    trainer.loader.consumed_samples = position
    calls = []

    def read():
        calls.append(1)
        return trainer.loader.next_batch()

    batches, stopping = receive(made, read, stop=made.world.rank() == 1)
    return {
        "reader": made.is_reader,
        "calls": len(calls),
        "stopping": stopping,
        "stage": made.stage,
        "tables": [batch_hash(b, without=("pixels_NCHW",)) for b in batches],
        "pixels": [b.pixels_NCHW.untyped_storage().nbytes() for b in batches],
        "whole": [batch_hash(b) for b in batches],
        "own": [batch_hash(b) for b in own],
    }


@pytest.mark.parametrize("name", ["TP2", "PP2", "DP2", "TP2xPP2"])
def test_a_replica_shares_what_its_reader_read(ranks, scenes, name):
    size, sizes = LAYOUTS[name]
    found = ranks(size, on_rank_receive, digits_run(scenes, **sizes))
    replicas = 2 if name == "DP2" else 1
    assert sum(rank["reader"] for rank in found) == replicas
    for rank in found:
        assert rank["calls"] == int(rank["reader"])
        assert rank["stopping"]  # on all ranks, though one wished it
        if rank["stage"] == 0:
            assert rank["whole"] == rank["own"] and min(rank["pixels"]) > 0
        else:  # memory, not shape: a slice of nothing still carries what it is a slice of
            assert rank["pixels"] == [0] * len(rank["pixels"])
    assert len({tuple(rank["tables"]) for rank in found}) == replicas


def on_rank_message_size(run) -> tuple[int, int]:
    """Bytes that the reader pickles for the other ranks of its replica, and of its pixels."""
    made = groups.build(run.parallel)
    trainer = Trainer(run, made)
    sent = []
    broadcast = torch.distributed.broadcast_object_list

    def measured(objects, **keywords):
        sent.append(len(pickle.dumps(objects)))
        return broadcast(objects, **keywords)

    torch.distributed.broadcast_object_list = measured
    try:
        batches, _ = receive(made, trainer.loader.next_batch)
    finally:
        torch.distributed.broadcast_object_list = broadcast
    return sent[0], sum(b.pixels_NCHW.untyped_storage().nbytes() for b in batches)


def test_pixels_are_not_in_the_message_to_later_stages(ranks, scenes):
    (sent, pixels), _ = ranks(2, on_rank_message_size, digits_run(scenes, **PP2))
    # Four samples of ten 16-pixel tiles: 123 kB of pixels; all the rest is about 25 kB.
    assert pixels > 100_000
    assert sent < 0.5 * pixels

"""How rows reach the ranks, and how all of them learn of a bad one before they compute."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mm.data.batch import BatchMemory
from megatron_mm.engine import parcel
from megatron_mm.engine.feed import receive
from megatron_mm.errors import DataError
from megatron_mm.parallel import groups
from megatron_mm.train.trainer import Trainer
from support.collectives import counting, on_rank_collectives
from support.trainers import LAYOUTS, PP2, batch_hash, digits_run, parameters

SEED = 1
GLOBAL_BATCH = 4  # rows of a file here, so that one step reads each of them once


def row(question="<image>How many 3?", answer="2", image="images/train_000000.png"):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ],
        "images": [image] if image else [],
    }


def bad_row(kind: str) -> dict:
    good = row()
    if kind == "missing image":
        return good | {"images": ["none.png"]}
    if kind == "marks":
        return row(question="<image> and <image>: how many 3?")
    return row(answer="1 " * 200)


BAD = {
    "missing image": "does not exist",
    "marks": "2 <image> marks but 1 images",
    "too long": "seq_length is 128",
}


def write(folder: Path, rows: list[dict]) -> Path:
    """The n-th of `rows` is the n-th that the first epoch reads."""
    order = np.random.default_rng([SEED, 0, 0]).permutation(len(rows))
    lines = [""] * len(rows)
    for place, number in enumerate(order):
        lines[number] = json.dumps(rows[place])
    path = folder / f"rows{len(list(folder.glob('rows*')))}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def where(path, place: int, count: int = GLOBAL_BATCH) -> str:
    order = np.random.default_rng([SEED, 0, 0]).permutation(count)
    return f"{path}:{order[place] + 1}"


@pytest.fixture
def data(tmp_path, scenes):
    """data(row, ...) -> path of a new file beside the scenes' images."""
    (tmp_path / "images").symlink_to(scenes / "images")

    def make(*rows):
        return write(tmp_path, rows)

    return make


# ---- bad rows ----


def on_rank_bad_rows(*runs) -> list[dict]:
    made = groups.build(runs[0].parallel)
    found = []
    for run in runs:
        trainer = Trainer(run, made)
        before = parameters(trainer)
        forward_backward, started = trainer.engine.forward_backward, []

        def noted(*args, forward_backward=forward_backward, started=started):
            started.append(1)
            return forward_backward(*args)

        trainer.engine.forward_backward = noted
        try:
            trainer.step()
            error = None
        except DataError as problem:
            error = str(problem)
        after = parameters(trainer)
        unchanged = all(torch.equal(after[name], before[name]) for name in after)
        found.append(
            {"error": error, "started": len(started), "iteration": trainer.iteration,
             "unchanged": unchanged}
        )  # fmt: skip
    return found


@pytest.mark.parametrize("name", ["one rank", "TP2", "PP2", "DP2"])
def test_a_bad_row_is_the_same_error_on_every_rank(ranks, scenes, data, name):
    size, sizes = LAYOUTS[name]
    # The last row of the step: with two replicas the second one reads it, alone.
    good = [row()] * (GLOBAL_BATCH - 1)
    paths = {kind: data(*good, bad_row(kind)) for kind in BAD}
    runs = [digits_run(scenes, path, **sizes) for path in paths.values()]
    everywhere = ranks(size, on_rank_bad_rows, *runs)
    assert all(rank == everywhere[0] for rank in everywhere)
    for (kind, path), found in zip(paths.items(), everywhere[0], strict=True):
        assert found["error"].startswith(f"{where(path, GLOBAL_BATCH - 1)}: "), kind
        assert BAD[kind] in found["error"] and "\n" not in found["error"]
        assert (found["started"], found["iteration"], found["unchanged"]) == (0, 0, True)


def test_of_two_bad_rows_the_first_replicas_is_told(ranks, scenes, data):
    rows = [bad_row("marks"), row(), row(), bad_row("missing image")]
    path = data(*rows)
    for (found,) in ranks(2, on_rank_bad_rows, digits_run(scenes, path)):
        assert found["error"].startswith(f"{where(path, 0)}: ")


def on_rank_construction(*runs) -> list[str]:
    made = groups.build(runs[0].parallel)
    errors = []
    for run in runs:
        try:
            Trainer(run, made)
            errors.append("no error")
        except DataError as problem:
            errors.append(str(problem))
    return errors


@pytest.mark.parametrize("name", ["one rank", "PP2", "DP2"])
def test_data_that_cannot_be_opened_is_one_error_on_every_rank(ranks, scenes, tmp_path, name):
    size, sizes = LAYOUTS[name]
    (tmp_path / "empty.jsonl").write_text("\n")
    words = {
        f"{tmp_path}/empty.jsonl: 0 rows": digits_run(scenes, tmp_path / "empty.jsonl", **sizes),
        "none.jsonl: there is no such file": digits_run(scenes, "none.jsonl", **sizes),
        "train_data has 0 phases": digits_run(scenes, train_data=[], **sizes),
        "tokenizer_model is not set": digits_run(scenes, tokenizer_model="", **sizes),
        "'nowhere' is neither": digits_run(scenes, tokenizer_model="nowhere", **sizes),
        "the model's vocab_size is 64": digits_run(scenes, vocab_size=64, **sizes),
        "nothing.jsonl: there is no such file": digits_run(
            scenes, valid_data=str(tmp_path / "nothing.jsonl"), **sizes
        ),
    }
    everywhere = ranks(size, on_rank_construction, *words.values())
    assert all(rank == everywhere[0] for rank in everywhere)
    for expected, error in zip(words, everywhere[0], strict=True):
        assert expected in error and "\n" not in error


def on_rank_broken_reader(run) -> str:
    made = groups.build(run.parallel)

    def read():
        raise OSError(5, "Input/output error")

    try:
        receive(made, read)
    except DataError as problem:
        return str(problem)
    return "no error"


def test_a_reader_that_fails_in_any_way_leaves_nobody_waiting(ranks, scenes):
    expected = "reading failed: OSError: [Errno 5] Input/output error"
    assert ranks(2, on_rank_broken_reader, digits_run(scenes, **PP2)) == [expected] * 2


# ---- skipping ----


def on_rank_train(steps: int, *runs) -> list[tuple[list[dict], set[str]]]:
    """Returns, for each run, the metrics of each step and the parameters that changed."""
    made = groups.build(runs[0].parallel)
    found = []
    for run in runs:
        trainer = Trainer(run, made)
        before = parameters(trainer)
        metrics = [trainer.step() for _ in range(steps)]
        after = parameters(trainer)
        found.append((metrics, {n for n in after if not torch.equal(after[n], before[n])}))
    return found


@pytest.mark.parametrize("name", ["one rank", "TP2", "PP2", "DP2"])
def test_skipped_rows_are_counted_and_training_goes_on(ranks, scenes, data, name):
    """(2, 3) are a whole microbatch, and with two replicas all that the second one has."""
    size, sizes = LAYOUTS[name]
    kinds, cases, runs = list(BAD), [(3,), (2, 3), (0, 2)], []
    for bad in cases:
        rows = [bad_row(kinds[i % 3]) if i in bad else row() for i in range(GLOBAL_BATCH)]
        runs.append(digits_run(scenes, data(*rows), on_bad_sample="skip", **sizes))
    for rank in ranks(size, on_rank_train, 2, *runs):
        for bad, (metrics, _) in zip(cases, rank, strict=True):
            for step in metrics:  # the second step reads the same rows in another order
                assert step["train/skipped_samples"] == len(bad)
                assert math.isfinite(step["train/lm_loss"]) and step["train/lm_loss"] > 0
                assert math.isfinite(step["train/grad_norm"]) and step["train/grad_norm"] > 0
                assert math.isfinite(step["moe/load_balancing_loss"])
            assert metrics[1]["train/consumed_samples"] == 2 * GLOBAL_BATCH


def test_skipping_rows_is_training_without_them(ranks, scenes, data):
    """Not only finite: the loss and the gradient of the rows that are left."""
    rows = [row(question=f"<image>How many {n}?", answer=str(n)) for n in range(4)]
    kept = [rows[0], rows[1], bad_row("marks"), bad_row("too long")]
    run = digits_run(scenes, data(*kept), on_bad_sample="skip")
    alone = digits_run(scenes, data(*rows[:2]), global_batch_size=2)
    (((skipping,), _), ((plain,), _)) = ranks(1, on_rank_train, 1, run, alone)[0]
    for name in ("train/lm_loss", "train/grad_norm", "train/tokens"):
        # Two of the four rows, perhaps in the other order: sums of fp32 in another order.
        assert skipping[name] == pytest.approx(plain[name], rel=1e-5), name


@pytest.mark.parametrize("name", ["one rank", "DP2"])
def test_a_step_of_skipped_rows_alone_is_an_error(ranks, scenes, data, name):
    size, sizes = LAYOUTS[name]
    path = data(*(bad_row("marks") for _ in range(GLOBAL_BATCH)))
    run = digits_run(scenes, path, on_bad_sample="skip", **sizes)
    everywhere = ranks(size, on_rank_bad_rows, run)
    assert all(rank == everywhere[0] for rank in everywhere)
    (found,) = everywhere[0]
    assert found["error"].startswith("every row of a step was left out, the first because: ")
    assert f"{where(path, 0)}: {BAD['marks']}" in found["error"] and "\n" not in found["error"]
    assert found["iteration"] == 0 and found["unchanged"]


# ---- text beside images ----


@pytest.mark.parametrize("name", ["one rank", "TP2", "PP2", "DP2", "DP2 overlapped"])
def test_text_only_rows_train_beside_images(ranks, scenes, data, name):
    """The first microbatch, one replica's whole share, has no image. With overlap, a gradient
    that never comes is an error in megatron-core: the ViT must take part all the same."""
    size, sizes = LAYOUTS[name.split()[0] if name != "one rank" else name]
    if name.endswith("overlapped"):
        sizes = sizes | dict(overlap_grad_reduce=True, overlap_param_gather=True)
    text = [row(question=f"How many {n}?", image=None) for n in range(2)]
    run = digits_run(scenes, data(*text, row(), row()), **sizes)
    plain = digits_run(scenes, run.data.train_data[0].path)
    ((expected, _),) = ranks(1, on_rank_train, 2, plain)[0]
    for ((metrics, _),) in ranks(size, on_rank_train, 2, run):
        for step, alone in zip(metrics, expected, strict=True):
            # As support.trainers.LOSS_TOLERANCE.
            assert step["train/lm_loss"] == pytest.approx(alone["train/lm_loss"], rel=1e-5)
            assert step["train/tokens"] == alone["train/tokens"]


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
        "stage": made.pg.pp.rank(),
        "tables": [batch_hash(b, without=("pixels_NCHW",)) for b in batches],
        "pixels": [b.pixels_NCHW.untyped_storage().nbytes() for b in batches],
        "whole": [batch_hash(b) for b in batches],
        "own": [batch_hash(b) for b in own],
    }


@pytest.mark.parametrize("name", ["TP2", "PP2", "DP2", "CP2", "TP2xPP2", "PP2xVPP2xCP2"])
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
    """Bytes that the replica's reader sends over the CPU, and bytes of its pixels."""
    made = groups.build(run.parallel)
    trainer = Trainer(run, made)
    sent = []
    with counting(torch.distributed, "broadcast", lambda tensor, *_: sent.append(tensor.nbytes)):
        batches, _ = receive(made, trainer.loader.next_batch)
    return sum(sent), sum(b.pixels_NCHW.untyped_storage().nbytes() for b in batches)


def test_pixels_are_not_in_the_message_to_later_stages(ranks, scenes):
    (sent, pixels), _ = ranks(2, on_rank_message_size, digits_run(scenes, **PP2))
    assert pixels == 4 * 10 * 3 * 16 * 16  # four samples of ten tiles, a byte a value
    assert 0 < sent < pixels / 2


# ---- numbers of fixed size, and objects only when something is wrong ----


@pytest.mark.parametrize("name", ["one rank", "TP2", "PP2", "DP2", "EP2"])
def test_a_healthy_step_sends_no_objects_and_agrees_once(ranks, scenes, name):
    size, sizes = LAYOUTS[name]
    for first, *later in ranks(size, on_rank_collectives, digits_run(scenes, **sizes), 3):
        # The first step tells which metrics there are.
        assert first == {"agreements": 1, "all_gather_object": 1}
        assert later == [{"agreements": 1}] * 2


def test_a_step_that_leaves_rows_out_tells_why(ranks, scenes, data):
    rows = [row(), row(), row(), bad_row("marks")]
    run = digits_run(scenes, data(*rows), on_bad_sample="skip")
    for _, *later in ranks(2, on_rank_collectives, run, 3):
        assert later == [{"agreements": 1, "all_gather_object": 1}] * 2


def on_rank_fingerprints(run, marks) -> list[str]:
    made = groups.build(run.parallel)
    found = []
    for of_rank in marks:
        mark = of_rank[made.world.rank()]
        try:
            receive(made, list, fingerprint=lambda mark=mark: mark)
            found.append("")
        except DataError as problem:
            found.append(str(problem))
    return found


def test_readers_that_chose_different_samples_are_told(ranks, scenes):
    """The largest and the smallest checksum, and whatever is between them."""
    top = 2**32 - 1
    marks = [(7, 7), (0, 0), (top, top), (7, 8), (0, top), (top, 0)]
    for errors in ranks(2, on_rank_fingerprints, digits_run(scenes), marks):
        assert errors[:3] == ["", "", ""]
        for error in errors[3:]:
            assert error.startswith("ranks 0 and 1 chose different samples for a step: a data file")


# ---- parcels ----


def test_a_parcel_gives_back_the_value():
    base = torch.arange(24.0)
    shared = torch.tensor([[1, 2, 3]])
    value = {
        "part of more": base[3:5],
        "not contiguous": base.view(4, 6).t(),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.empty(0, 3, dtype=torch.uint8),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "twice": [shared, shared],
        "words": ["a", None, 3],
        "batch": BatchMemory.build(
            [1, 2], [torch.ones(2, 2)], [torch.ones(2)], [torch.tensor([[0, 5], [1, 5]])]
        ),
    }
    block = parcel.wrap(value)
    assert block.dtype == torch.uint8 and block.dim() == 1
    found = parcel.unwrap(block.clone())
    assert list(found) == list(value) and found["words"] == value["words"]
    for name in list(value)[:6]:
        assert found[name].dtype == value[name].dtype and torch.equal(found[name], value[name])
    assert all(torch.equal(one, shared) for one in found["twice"])
    for name, held in vars(value["batch"]).items():
        assert torch.equal(getattr(found["batch"], name), held)
    # Without elements it keeps no block alive; a part of a tensor brings no more than the part.
    assert found["none"].untyped_storage().nbytes() == 0
    assert len(parcel.wrap(base[:1])) + 64 < len(parcel.wrap(base.clone().expand(9, 24).clone()))
    assert len(parcel.wrap(base[:1])) == len(parcel.wrap(base[:1].clone()))

"""Failures end a recording on every rank, and before hours are lost where they can be foreseen."""

from __future__ import annotations

import errno

import pytest
import torch
import torch.distributed as dist

from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.earl.stored_run import check_flags
from megatron_mm.errors import DataError
from megatron_mm.mimic import rounds
from megatron_mm.mimic.record import record
from megatron_mm.mimic.recorded import Recorded
from megatron_mm.mimic.rounds import Rows
from megatron_mm.mimic.route_spool import RouteSpool
from support.trainers import digits_run
from support.weights import random_engine


def on_rank_fail(run, data: str, bad_row: bool) -> str:
    """Records on a disk that is full behind the second row, or a row that no check foresaw."""
    engine, tokenizer = random_engine(run), load_tokenizer(run.data.tokenizer_model)
    kept: list = []

    def keep(place, row) -> None:
        if kept:
            raise DataError("routes.st cannot be written: No space left on device")
        kept.append(place)

    def odd(self, row, where, folder):
        raise KeyError("none foresaw this")

    of_rank_0 = keep if dist.get_rank() == 0 else None
    builder = rounds.SampleBuilder
    training = builder.training
    if bad_row:
        builder.training = odd
    try:
        record(engine, tokenizer, Rows([data], 8, 2), [0, 1], 3, 0, of_rank_0)
    except DataError as error:
        return str(error)
    finally:
        builder.training = training
    return "recorded"


def test_every_rank_learns_what_ends_it(ranks, scenes):
    data = str(scenes / "mix.jsonl")
    run = digits_run(scenes, tensor_model_parallel_size=2)
    said = ranks(2, on_rank_fail, run, data, False)
    assert said == ["routes.st cannot be written: No space left on device"] * 2
    first, second = ranks(2, on_rank_fail, run, data, True)
    assert first == second and first.startswith(f"{data}:") and "KeyError" in first


def test_a_full_disk_is_told_when_the_row_comes(tmp_path, monkeypatch):
    spool = RouteSpool(tmp_path / "routes.st")
    few = Recorded(
        *(b"1", b"2", torch.zeros(1, dtype=torch.int32)),
        *(torch.zeros(1, 2, 3, dtype=torch.int16), torch.ones(1, 2, 3, dtype=torch.float16)),
        *(torch.zeros(1, 0, dtype=torch.int32), torch.zeros(1, 0)),
    )
    spool.add(("rows.jsonl", 1), few)
    assert torch.equal(spool["rows.jsonl", 1].weights, few.weights)

    class Full:
        def __getattr__(self, name):
            return getattr(held, name)

        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

        def read(self, size):
            raise OSError(errno.EIO, "Input/output error")

    held = spool._file
    monkeypatch.setattr(spool, "_file", Full())
    with pytest.raises(DataError, match=r"routes\.st cannot be written: No space left on device"):
        spool.add(("rows.jsonl", 2), few)
    with pytest.raises(DataError, match=r"routes\.st: recorded rows are lost: Input/output error"):
        spool["rows.jsonl", 1]


def test_an_output_that_is_a_folder_is_refused_before_the_work(tmp_path):
    with pytest.raises(DataError, match="--out .* cannot be written: Is a directory"):
        RouteSpool(tmp_path)


def test_rows_of_others_may_have_other_columns_and_be_longer():
    check_flags(["--extra-columns", "scene", "--seq-length", "4096"], "recording")

"""The pool that most tests run on: joining survives a rank that cannot connect at first."""

from __future__ import annotations

import datetime

import pytest
import torch
import torch.distributed as dist

from support.ranks import JOIN_TRIES, _join


def joins_again(path: str, failures: int) -> tuple[int, float]:
    """(tries, a sum over ranks) where rank 1 fails so often after the others have connected."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    start, tries = dist.init_process_group, 0

    def failing(*args, **kwargs):
        nonlocal tries
        tries += 1
        start(*args, **kwargs)
        if rank == 1 and tries <= failures:
            dist.destroy_process_group()
            raise RuntimeError("Connection closed by peer")

    dist.init_process_group = failing
    try:
        _join(path, rank, size, datetime.timedelta(seconds=30))
    finally:
        dist.init_process_group = start
    total = torch.tensor(rank + 1.0)
    dist.all_reduce(total)
    return tries, total.item()


@pytest.mark.parametrize("failures", [0, 1, JOIN_TRIES - 1])
def test_all_try_again_together(ranks, tmp_path, failures):
    found = ranks(3, joins_again, str(tmp_path / "store"), failures)
    assert found == [(failures + 1, 6.0)] * 3


def test_not_for_ever(ranks, tmp_path):
    with pytest.raises(AssertionError, match="tries to connect failed.*closed by peer"):
        ranks(3, joins_again, str(tmp_path / "store"), JOIN_TRIES)

"""A run that was saved and loaded goes on exactly as one that was never interrupted."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatron_mm.checkpoint import sharded
from megatron_mm.config import MODULES, RunConfig
from support.checkpoint_runs import create, interrupted, scramble, tiny_run, train
from support.fingerprints import state_hash

PLAIN = dict(use_distributed_optimizer=False)
OVERLAP = dict(overlap_grad_reduce=True, overlap_param_gather=True)
BF16 = dict(bf16=True)


def _only(module: str) -> dict[str, bool]:
    return {f"freeze_{other}": other != module for other in MODULES}


CASES = {
    "1 rank": (1, {}, {}),
    "TP2": (2, dict(tp=2), {}),
    "PP2": (2, dict(pp=2), {}),
    "EP2": (2, dict(ep=2), {}),
    "DP2": (2, {}, {}),
    "DP2 overlapped": (2, OVERLAP, {}),
    "DP2 without distributed optimizer": (2, PLAIN, {}),
    "TP2xPP2": (4, dict(tp=2, pp=2), {}),
    "PP2xEP2": (4, dict(pp=2, ep=2), {}),
    "bf16": (1, {}, BF16),
    "bf16 DP2": (2, {}, BF16),
    "bf16 EP2 without distributed optimizer": (2, dict(ep=2, **PLAIN), BF16),
    "frozen ViT and language": (2, {}, dict(freeze_vision=True, freeze_language=True)),
    "experts alone, EP2": (2, dict(ep=2), _only("experts")),
    "experts alone, DP2": (2, {}, _only("experts")),
    "PP2 with nothing to train on the last stage": (
        2,
        dict(pp=2),
        _only("projector"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_resume_is_exact_to_the_bit(ranks, tmp_path, name):
    size, parallel, training = CASES[name]
    for rank, seen in enumerate(ranks(size, interrupted, tiny_run(parallel, **training), tmp_path)):
        assert seen["loaded"] == seen["saved"], f"rank {rank}"
        assert seen["end again"] == seen["end"], f"rank {rank}"
        assert seen["fresh"] != seen["end weights"]


def before_the_first_step(run: RunConfig, folder: Path) -> tuple[str, str]:
    engine = create(run)
    scramble()
    sharded.save(engine, {}, folder, 0)
    train(engine, range(2))
    again = create(run, engine.groups)
    sharded.load(again, folder)
    train(again, range(2))
    return state_hash(engine, generators=False), state_hash(again, generators=False)


def test_a_checkpoint_before_the_first_step(ranks, tmp_path):
    for one, other in ranks(2, before_the_first_step, tiny_run(), tmp_path):
        assert one == other


def timed(run: RunConfig, folder: Path) -> tuple[float, float]:
    engine = create(run)
    train(engine, range(1))
    sharded.save(engine, {}, folder, 1)  # first use imports and allocates
    begin = time.perf_counter()
    sharded.save(engine, {}, folder, 2)
    middle = time.perf_counter()
    sharded.load(engine, folder)
    return middle - begin, time.perf_counter() - middle


def test_saving_takes_well_below_a_second(ranks, tmp_path):
    """0.05 s is usual; the bound leaves room for a busy machine."""
    saving, loading = ranks(1, timed, tiny_run(), tmp_path)[0]
    assert saving < 1.0
    assert loading < 1.0

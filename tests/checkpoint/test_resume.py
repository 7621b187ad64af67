"""A run that was saved and loaded goes on exactly as one that was never interrupted."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_mm.checkpoint import optimizer_state, sharded
from megatron_mm.checkpoint.compatible import narrows
from megatron_mm.config import MODULES, CheckpointConfig, RunConfig
from megatron_mm.convert import to_hf
from megatron_mm.convert.folder import NOTES
from megatron_mm.errors import CheckpointError
from megatron_mm.train.start import start
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


def state_left_when_restored(run: RunConfig, folder: Path) -> tuple[list[str], int]:
    """The loaded tensors that are still held when the optimizer takes its state."""
    engine = create(run)
    train(engine, range(1))
    sharded.save(engine, {}, folder, 1)
    held: list[dict] = []
    apply, restore = sharded._apply, optimizer_state.restore
    left: list[str] = []

    def applied(engine, tensors, *args):
        held.append(tensors)
        apply(engine, tensors, *args)

    def restored(*args):
        left.extend(held[0])
        restore(*args)

    sharded._apply, optimizer_state.restore = applied, restored
    try:
        sharded.load(engine, folder)
    finally:
        sharded._apply, optimizer_state.restore = apply, restore
    return left, len(held)


def test_what_is_loaded_is_not_held_twice(ranks, tmp_path):
    """Copies of master parameters and moments beside what was read would take twice the memory
    that saving does."""
    assert ranks(1, state_left_when_restored, tiny_run(bf16=True), tmp_path) == [([], 1)]


def mixed(run: RunConfig, folder: Path, target: Path) -> str:
    """Two iterations; each rank exports what it has found, as while a run is saving."""
    engine = create(run)
    for iteration in (1, 2):
        sharded.save(engine, {}, folder, iteration)
    checkpoint = to_hf.open_checkpoint(folder / f"iter_000000{1 + dist.get_rank()}")
    try:
        to_hf.convert(checkpoint, target, dist.group.WORLD, assets=[], quiet=True)
    except CheckpointError as error:
        return str(error)
    return "exported"


def test_ranks_that_found_two_checkpoints_make_no_model_of_both(ranks, tmp_path):
    said = ranks(2, mixed, tiny_run(pattern="GE *E"), tmp_path / "run", tmp_path / "out")
    first, second = (tmp_path / "run" / f"iter_000000{n}" for n in (1, 2))
    assert set(said) == {
        f"ranks 0 and 1 found different checkpoints, {first} and {second}: is a run saving there? "
        "Name one of them"
    }
    assert not (tmp_path / "out").exists()


def begun(run: RunConfig, folder: Path, stored: dict, tokens: dict) -> str:
    engine = create(run)
    sharded.save(engine, {}, folder, 1, {NOTES: stored})
    try:
        start(engine, None, CheckpointConfig(load=str(folder), finetune=True), tokens)
    except CheckpointError as error:
        return str(error)
    return "begun"


@pytest.mark.parametrize(
    ("stored", "tokens", "words"),
    [
        ({"image_token_id": 7}, {"image_token_id": 7}, "begun"),
        ({}, {"image_token_id": 7}, "begun"),  # of a text model
        (
            {"image_token_id": 7},
            {"image_token_id": 8},
            "image_token_id is 7 there, 8 in this run's tokenizer; use the tokenizer that it was",
        ),
        ({"look_ids": [5, 6]}, {"look_ids": [5, 6, 9]}, "begun"),  # places in words are added
        ({"look_ids": [5, 6, 9]}, {"look_ids": [5, 6]}, "begun"),
        ({"look_ids": [5, 6]}, {"look_ids": [5, 8]}, "look_ids is [5, 6] there, [5, 8] in this"),
    ],
)
def test_tokens_with_a_meaning_keep_their_ids(ranks, tmp_path, stored, tokens, words):
    (said,) = ranks(1, begun, tiny_run(), tmp_path, stored, tokens)
    assert words in said and "\n" not in said


def test_what_loses_digits():
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    lose = [(single, brain), (single, half), (half, brain)]
    for stored in (half, brain, single):
        for here in (half, brain, single):
            assert narrows(stored, here) == ((stored, here) in lose)

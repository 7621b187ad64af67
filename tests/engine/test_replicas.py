"""Copies of parameters: any flipped bit is seen, the odd rank and the parameter are named."""

from __future__ import annotations

import pytest
import torch

from megatron_mm.engine.replicas import NONE, Odd, Replicas, digest, odd_copies
from megatron_mm.errors import DivergedError
from megatron_mm.parallel import groups
from megatron_mm.parallel.param_layout import layouts
from megatron_mm.train.trainer import Trainer
from support.trainers import CP2, EP2, PP2, TP2, digits_run

# ---- digests ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
@pytest.mark.parametrize("count", [1, 3, 8, 1001])
def test_every_bit_counts(dtype, count):
    generator = torch.Generator().manual_seed(count)
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    tensor = raw.view(dtype)
    before = int(digest(tensor))
    seen = {before}
    for byte in range(0, len(raw), max(1, len(raw) // 50)):
        for bit in range(8):
            raw[byte] ^= 1 << bit
            seen.add(int(digest(tensor)))
            raw[byte] ^= 1 << bit
    assert int(digest(tensor)) == before
    assert len(seen) == 1 + 8 * len(range(0, len(raw), max(1, len(raw) // 50)))


def test_order_counts_and_place_in_memory_does_not():
    numbers = torch.randn(999)
    swapped = numbers.clone()
    swapped[[10, 700]] = numbers[[700, 10]]
    assert int(digest(numbers)) != int(digest(swapped))
    for offset in range(4):
        held = torch.randn(1100)
        held[offset : offset + 999] = numbers
        assert int(digest(held[offset : offset + 999])) == int(digest(numbers))
    signs = numbers.clone()
    signs[[11, 701]] *= -1  # the highest bits of two words
    assert int(digest(numbers)) != int(digest(signs))
    # NaN equals nothing, but its bits do; and -0 is another value than 0.
    assert int(digest(torch.tensor([float("nan")]))) == int(digest(torch.tensor([float("nan")])))
    assert int(digest(torch.tensor([0.0]))) != int(digest(torch.tensor([-0.0])))


def test_tensors_of_several_chunks(monkeypatch):
    from megatron_mm.engine import replicas

    monkeypatch.setattr(replicas, "CPU_CHUNK", 16)
    numbers = torch.randn(1000)
    seen = {int(digest(numbers))}
    for place in range(0, 1000, 7):
        changed = numbers.clone()
        changed.view(torch.int32)[place] ^= 1
        seen.add(int(digest(changed)))
    assert len(seen) == 1 + len(range(0, 1000, 7))


@pytest.mark.parametrize(
    ("keys", "digests", "expected"),
    [
        ([[1, 2], [1, 2]], [[5, 6], [5, 6]], None),
        ([[1, 2], [1, 2]], [[5, 6], [5, 7]], Odd(2, [0, 1], [])),
        ([[1, 2], [2, 1]], [[5, 6], [6, 5]], None),  # in another order
        ([[1, 2], [3, 4]], [[5, 6], [7, 8]], None),  # no copies
        ([[1, NONE], [1, 2]], [[5, 9], [5, 7]], None),  # padding
        ([[1], [1], [1]], [[5], [5], [4]], Odd(1, [2], [0, 1])),
        ([[1], [1], [1], [1]], [[9], [5], [5], [5]], Odd(1, [0], [1, 2, 3])),
        ([[1], [1], [1], [1]], [[9], [9], [5], [5]], Odd(1, [0, 1, 2, 3], [])),
        ([[1], [1], [1]], [[1], [2], [3]], Odd(1, [0, 1, 2], [])),
        ([[1], [2], [1], [2]], [[-5], [6], [-5], [-6]], Odd(2, [1, 3], [])),
    ],
)
def test_the_odd_copy(keys, digests, expected):
    assert odd_copies(torch.tensor(keys), torch.tensor(digests)) == expected


# ---- on ranks ----


def copies_of(trainer, replicas: Replicas) -> list[str]:
    """Returns the parameters of which another rank holds a copy."""
    keys = replicas._keys_WP.flatten().tolist()
    return [name for key, name in replicas._keys.items() if keys.count(key) > 1]


def flip(trainer, name: str) -> None:
    """Flips the lowest bit of the mantissa of one element."""
    for found, param, _ in layouts(*trainer.engine.chunks):
        if found == name:
            bits = torch.int32 if param.dtype == torch.float32 else torch.int16
            param.data.view(-1)[-1:].view(bits)[0] ^= 1


def on_rank_flip(run, most: int) -> dict:
    """Plants a bit on the last rank in one replicated parameter after another."""
    trainer = Trainer(run, groups.build(run.parallel))
    for _ in range(3):  # the check of the first step is among them; none is a false alarm
        trainer.step()
        trainer.replicas.check(trainer.iteration)
    names = copies_of(trainer, trainer.replicas)
    world = trainer.groups.world
    found = {}
    for name in names[:: max(1, len(names) // most)]:
        if world.rank() == world.size() - 1:
            flip(trainer, name)
        try:
            trainer.replicas.check(trainer.iteration)
        except DivergedError as error:
            found[name] = str(error)
        if world.rank() == world.size() - 1:
            flip(trainer, name)
    trainer.replicas.check(trainer.iteration)
    return {"copies": len(names), "found": found}


CASES = {
    "TP2": (2, TP2, {}),
    "CP2": (2, CP2, {}),
    "DP2": (2, {}, {"use_distributed_optimizer": False}),
    "EP2": (2, EP2, {}),
    "TP2 of two replicas": (4, TP2, {"use_distributed_optimizer": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_planted_bit_is_named(ranks, scenes, name):
    size, sizes, more = CASES[name]
    run = digits_run(scenes, **sizes, **more)
    found = ranks(size, on_rank_flip, run, 8)
    assert len({str(rank["found"]) for rank in found}) == 1 or name == "TP2 of two replicas"
    last = found[-1]
    assert last["copies"] >= 8 and len(last["found"]) >= 8
    for parameter, text in last["found"].items():
        assert text.startswith(f"copies of parameter {parameter} differ at iteration 3: "), text
        assert f"rank {size - 1} on " in text and "\n" not in text


def test_ranks_that_share_nothing_do_not_complain(ranks, scenes):
    for rank in ranks(2, on_rank_shares, digits_run(scenes, **PP2)):
        assert rank == 0


def on_rank_shares(run) -> int:
    trainer = Trainer(run, groups.build(run.parallel))
    trainer.step()
    trainer.replicas.check(1)
    return len(copies_of(trainer, trainer.replicas))


def on_rank_interval(run) -> tuple[int, str]:
    """Plants a bit after step 2; returns (steps done, the error)."""
    trainer = Trainer(run, groups.build(run.parallel))
    try:
        for _ in range(9):
            trainer.step()
            if trainer.iteration == 2 and trainer.groups.world.rank() == 1:
                flip(trainer, copies_of(trainer, trainer.replicas)[0])
    except DivergedError as error:
        return trainer.iteration, str(error)
    return trainer.iteration, "nothing"


@pytest.mark.parametrize(("interval", "seen_at"), [(4, 4), (None, 9)])
def test_the_interval_is_kept(ranks, scenes, interval, seen_at):
    run = digits_run(scenes, **TP2, check_weight_hash_across_dp_replicas_interval=interval)
    for iteration, text in ranks(2, on_rank_interval, run):
        assert iteration == seen_at
        assert ("differ at iteration 4" in text) == (interval is not None)

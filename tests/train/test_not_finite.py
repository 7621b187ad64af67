"""A loss or gradient that is not finite stops every rank before the update.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_mm.checkpoint import folders
from megatron_mm.errors import CheckpointError, NonFiniteError
from megatron_mm.parallel.param_layout import layouts
from support.fingerprints import parameter_hash
from support.trainers import LAYOUTS, digits_run, new_trainer, peek


def poison_weight(trainer) -> None:
    for name, param, _ in layouts(*trainer.engine.chunks):
        if name == "final_norm.weight":
            param.data[0] = torch.nan
    trainer.engine.optimizer.reload_model_params()


def poison_patch(trainer) -> None:
    """On the second of two replicas only, in its last microbatch."""
    read = trainer.loader.next_batch

    def poisoned():
        batches = read()
        if trainer.groups.pg.dp.rank() == 1:
            batches[-1].memories["vision"].coordinates_M2[0, 0] = torch.nan
        return batches

    trainer.loader.next_batch = poisoned


def poison_gradient(trainer, suffix: str = "linear_fc2.weight") -> None:
    """On the last rank only; the loss stays finite."""
    if trainer.groups.world.rank() == trainer.groups.world.size() - 1:
        params = [p for name, p, _ in layouts(*trainer.engine.chunks) if name.endswith(suffix)]
        params[-1].register_hook(lambda gradient: gradient * math.inf)


def poison_expert_gradient(trainer) -> None:
    """Experts that the first rank does not have."""
    poison_gradient(trainer, "experts.down")


def poison_sum(trainer) -> None:
    """On the last rank only, after gradients were summed over replicas."""
    if trainer.groups.world.rank() == trainer.groups.world.size() - 1:
        norm = trainer.engine.gradient_norm

        def poisoned() -> float:
            for _, param, _ in layouts(*trainer.engine.chunks):
                param.main_grad.fill_(math.nan)
            return norm()

        trainer.engine.gradient_norm = poisoned


def on_rank_poisoned(run, poison) -> dict:
    trainer = new_trainer(run)
    trainer.step()
    poison(trainer)
    updates = []
    update, trainer.engine.update = trainer.engine.update, lambda: updates.append(update())
    before = parameter_hash(trainer.engine)
    read = [name for batch in peek(trainer) for name in batch.samples]
    try:
        trainer.step()
        error = None
    except NonFiniteError as problem:
        error = str(problem)
    unchanged = parameter_hash(trainer.engine) == before
    return {
        "error": error, "updates": len(updates), "unchanged": unchanged,
        "iteration": trainer.iteration, "read": read,
    }  # fmt: skip


def rows_in(message: str) -> set[str]:
    return set(re.findall(r"\S+\.jsonl:\d+", message))


POISONS = {
    "a weight, one rank": (poison_weight, "one rank", "train/lm_loss nan"),
    "a weight, PP2": (poison_weight, "PP2", "train/lm_loss nan"),
    "a weight, TP2": (poison_weight, "TP2", "train/lm_loss nan"),
    "a patch of one replica": (poison_patch, "DP2", "train/lm_loss nan"),
    "a patch of one replica, EP2": (poison_patch, "EP2", "train/lm_loss nan"),
    "a gradient, one rank": (poison_gradient, "one rank", "gradient norm"),
    "a gradient of one replica": (poison_gradient, "DP2", "gradient norm"),
    "a gradient of one stage": (poison_gradient, "PP2", "gradient norm"),
    "a sum of one replica": (poison_sum, "DP2", "gradient norm"),
    "a sum of one tensor-parallel rank": (poison_sum, "TP2", "gradient norm"),
    "a sum of one context-parallel rank": (poison_sum, "CP2", "gradient norm"),
    "a gradient of one rank's experts": (poison_expert_gradient, "EP2", "gradient norm"),
}


# Without the distributed optimizer gradients are summed and normed over other groups.
SHARED_GRADIENTS = (
    *("a gradient of one replica", "a gradient of one rank's experts"),
    *("a sum of one replica", "a sum of one context-parallel rank"),
)


@pytest.mark.parametrize(
    ("case", "distributed_optimizer"),
    [(case, True) for case in POISONS] + [(case, False) for case in SHARED_GRADIENTS],
)
def test_a_number_that_is_not_finite_stops_every_rank_before_the_update(
    ranks, scenes, case, distributed_optimizer
):
    poison, name, message = POISONS[case]
    size, sizes = LAYOUTS[name]
    run = digits_run(
        scenes, micro_batch_size=1, use_distributed_optimizer=distributed_optimizer, **sizes
    )
    found = ranks(size, on_rank_poisoned, run, poison)
    assert len({rank["error"] for rank in found}) == 1
    for rank in found:
        assert rank["error"] and rank["error"].startswith(message), rank["error"]
        assert "\n" not in rank["error"]
        assert "at iteration 2: nothing was updated" in rank["error"]
        assert (rank["updates"], rank["unchanged"], rank["iteration"]) == (0, True, 1)
        read = {row for other in found for row in other["read"]}
        named = rows_in(rank["error"])
        if message == "gradient norm":  # its sum has no microbatch: the whole step
            assert named == read and len(read) == 4
        elif case == "a patch of one replica":  # that microbatch and no other
            assert named == {found[1]["read"][-1]}
        else:  # experts shared by replicas hand a NaN on, so the other's loss may be named
            assert len(named) == 1 and named <= read


def on_rank_saves_after(run, poison) -> tuple[str, list[str], int]:
    """(the error of a save after a step whose loss or gradient was not finite, the folder, what
    its newest checkpoint is of)."""
    trainer = new_trainer(run)
    trainer.step()
    trainer.save()
    poison(trainer)
    with pytest.raises(NonFiniteError):
        trainer.step()
    with pytest.raises(CheckpointError) as caught:
        trainer.save()
        trainer.saver.finish()
    trainer.saver.close()
    dist.barrier()
    folder = Path(run.checkpoint.save)
    path, stored = folders.resolve(folder)
    return str(caught.value), sorted(p.name for p in folder.iterdir()), stored["iteration"]


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(
    "case", ["a weight, one rank", "a patch of one replica", "a gradient of one stage"]
)
def test_nothing_is_saved_after_it(ranks, scenes, tmp_path, case, behind):
    """Not even where every weight is finite: what made the loss so may be in them."""
    poison, name, message = POISONS[case]
    size, sizes = LAYOUTS[name]
    run = digits_run(
        scenes, micro_batch_size=1, keep_last_checkpoints=1, async_save=behind, **sizes
    )
    run.checkpoint.save = str(tmp_path / "saved")
    found = ranks(size, on_rank_saves_after, run, poison)
    assert len({error for error, _, _ in found}) == 1
    for error, names, iteration in found:
        assert error.startswith(f"cannot save iteration 1: {message}") and "\n" not in error
        assert "earlier checkpoints are kept" in error
        assert (names, iteration) == (["iter_0000001", "latest"], 1)

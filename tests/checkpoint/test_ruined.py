"""A state that is not finite is never saved, so it never takes the place of a good one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_mm.checkpoint import sealed, sharded
from megatron_mm.checkpoint.finite import not_finite
from megatron_mm.checkpoint.merge import merge_adapters
from megatron_mm.checkpoint.optimizer_state import owned
from megatron_mm.checkpoint.parameters import parameters
from megatron_mm.checkpoint.saver import Saver
from megatron_mm.config import LoraConfig
from megatron_mm.errors import CheckpointError
from megatron_mm.model.layers.lora import is_adapter
from support.checkpoint_runs import create, tiny_run, train
from support.fingerprints import state_hash

NAN, INF = float("nan"), float("inf")
NORM, GATE = "final_norm.weight", "language.layers.0.moe.inner.experts.gate_up"


def parameter(engine, name):
    return {found: param for found, param, _ in parameters(engine)}[name]


def spoil(engine, what: str, value: float) -> None:
    kind, _, name = what.partition(" ")
    with torch.no_grad():
        if kind == "weight":
            parameter(engine, name).data.view(-1)[-1] = value
        else:
            owned(engine)[name].tensor(kind)[-1] = value


def spoilt_save(run, folder: Path, what: str, value: float, rank: int, behind: bool):
    """Returns (the error of a save with one number spoilt on one rank, whether the one before is
    still loaded, the names in the folder)."""
    engine = create(run)
    train(engine, range(1))
    saver = Saver(engine, asynchronous=behind, keep_last=1, folder=folder)
    saver.save({}, folder, 1, {})
    saver.finish()
    good = state_hash(engine)
    train(engine, range(1, 2))
    if dist.get_rank() == rank:
        spoil(engine, what, value)
    with pytest.raises(CheckpointError) as caught:
        saver.save({}, folder, 2, {})
        saver.finish()
    with pytest.raises(CheckpointError):  # again the same iteration, which is there
        saver.save({}, folder, 1, {})
    saver.close()
    dist.barrier()
    names = sorted(path.name for path in folder.iterdir())
    iteration = sharded.load(engine, folder)["iteration"]
    return str(caught.value), (iteration, state_hash(engine)) == (1, good), names


@pytest.mark.parametrize(
    ("size", "what", "value", "rank", "settings"),
    [
        (1, f"weight {NORM}", NAN, 0, {}),
        (1, f"weight {GATE}", -INF, 0, {}),
        (1, f"exp_avg {NORM}", INF, 0, {}),
        (1, f"exp_avg_sq {GATE}", NAN, 0, {}),
        (1, f"master {NORM}", NAN, 0, dict(bf16=True)),
        (2, f"weight {NORM}", NAN, 1, {}),
    ],
)
@pytest.mark.parametrize("behind", [False, True])
def test_one_number_that_is_not_finite(ranks, tmp_path, size, what, value, rank, settings, behind):
    run = tiny_run(dict(pp=2) if size == 2 else {}, **settings)
    found = ranks(size, spoilt_save, run, tmp_path, what, value, rank, behind)
    for message, intact, names in found:
        assert intact and names == ["iter_0000001", "latest"]
        assert "\n" not in message and message.startswith("cannot save iteration 2: ")
        kind, _, name = what.partition(" ")
        key = f"model.{name}" if kind == "weight" else f"optimizer.{kind}.{name}"
        # Without bf16 a weight is its own main parameter.
        assert f"{key} is not finite; earlier checkpoints are kept" in message
    assert len({message for message, _, _ in found}) == 1


def every_place(run) -> list[str | None]:
    """Returns the reasons for a NaN at the places of one weight where a vector instruction might
    pass over it, for the largest finite number, and for nothing wrong."""
    engine = create(run)
    param = parameter(engine, GATE)
    flat, said = param.data.view(-1), []
    for place in [*range(0, 40), *range(flat.numel() - 40, flat.numel())]:
        kept = flat[place].item()
        flat[place] = NAN
        said.append(not_finite(engine))
        flat[place] = kept
    flat[0] = torch.finfo(param.dtype).max
    return [*said, not_finite(engine)]


@pytest.mark.parametrize("bf16", [False, True])
def test_nan_is_seen_wherever_it_stands(ranks, bf16):
    (said,) = ranks(1, every_place, tiny_run(bf16=bf16))
    assert said == [f"model.{GATE}"] * 80 + [None]


@pytest.mark.parametrize(
    ("loader", "extra"),
    [
        ({"position": NAN}, {}),
        ({}, {"loss": INF}),
        ({}, {"deep": [{"x": -INF}]}),
        ({"weights": [0.5, NAN]}, {}),
        ({}, {"seconds": NAN}),
    ],
)
def test_a_note_that_is_not_finite(ranks, tmp_path, loader, extra):
    (message,) = ranks(1, saves_notes, tiny_run(), tmp_path, loader, extra)
    assert message.startswith("cannot save iteration 2: ") and "not JSON compliant" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", "latest"]
    assert sealed.read_json(tmp_path / "iter_0000001" / "run.json")["iteration"] == 1


def saves_notes(run, folder: Path, loader: dict, extra: dict) -> str:
    engine = create(run)
    sharded.save(engine, {}, folder, 1)
    with pytest.raises(CheckpointError) as caught:
        sharded.save(engine, loader, folder, 2, extra)
    return str(caught.value)


def merges(run, folder: Path) -> str:
    """Adapters whose product is not finite, though they are."""
    engine = create(run)
    sharded.save(engine, {}, folder / "adapted", 1)
    with torch.no_grad():
        for name, param, _ in parameters(engine):
            if is_adapter(name):
                param.fill_(1e30)
    sharded.save(engine, {}, folder / "adapted", 2)
    with pytest.raises(CheckpointError) as caught:
        merge_adapters(engine, folder / "adapted", folder / "merged")
    return str(caught.value)


def test_a_merge_that_overflows(ranks, tmp_path):
    run = tiny_run()
    run.lora = LoraConfig(lora_rank=2)
    (message,) = ranks(1, merges, run, tmp_path)
    assert "is not finite" in message
    assert list((tmp_path / "merged").iterdir()) == []

"""The size of a checkpoint, foretold from the settings and found on disk."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_mm.doctor.disk import checkpoint_bytes, disk
from megatron_mm.parallel import groups
from megatron_mm.train.trainer import Trainer
from support.trainers import digits_run

FROZEN = {"freeze_language": True, "freeze_experts": True, "freeze_vision": True}
RUNS = {
    "fp32": {},
    "bf16": {"bf16": True},
    "bf16, frozen": {"bf16": True, **FROZEN},
    "bf16, LoRA": {"bf16": True, "lora_rank": 4, "lora_targets": ["language", "vision"]},
}


def on_rank_saves(run) -> int:
    """Trains a step, saves, and returns the bytes of the tensors that are stored."""
    trainer = Trainer(run, groups.build(run.parallel))
    trainer.step()
    trainer.save()
    trainer.saver.finish()
    trainer.saver.close()
    stored = FileSystemReader(Path(run.checkpoint.save) / "iter_0000001").read_metadata()
    tensors = [
        entry
        for entry in stored.state_dict_metadata.values()
        if isinstance(entry, TensorStorageMetadata)
    ]
    return sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in tensors)


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_is_as_large_as_was_foretold(ranks, scenes, tmp_path, name):
    run = digits_run(scenes, save=str(tmp_path / "saved"), **RUNS[name])
    (stored,) = ranks(1, on_rank_saves, run)
    assert checkpoint_bytes(run) == stored


def test_what_does_not_learn_has_no_state(scenes):
    whole, frozen = (checkpoint_bytes(digits_run(scenes, **RUNS[n])) for n in list(RUNS)[1:3])
    assert frozen < 0.5 * whole
    assert whole * 12 / 14 == checkpoint_bytes(digits_run(scenes))


def test_room_is_compared_with_it(scenes, tmp_path, monkeypatch):
    run = digits_run(scenes, save=str(tmp_path / "saved"))
    needed = checkpoint_bytes(run)
    Usage = namedtuple("Usage", "total used free")
    for free, enough in ((needed, False), (needed + 1, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(0, 0, free))
        text, fits = disk(run)
        assert fits == enough and f"a checkpoint needs {needed / 1e9:,.1f} GB" in text
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 1))
    assert disk(digits_run(scenes, output_dir=str(tmp_path)))[1]  # it saves nothing

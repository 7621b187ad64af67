"""Out to Hugging Face and in again by `--load-hf`: training goes on from the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_mm.config import ConfigError, validate
from megatron_mm.convert import to_hf
from support.trainers import PP2, TP2, digits_run, new_trainer
from support.weights import move_looks_off_zero


def train_and_export(scenes: Path, out: Path) -> float:
    """Two steps, a checkpoint, an export; the loss of the step after them."""
    trainer = new_trainer(digits_run(scenes, save=str(out / "runs")))
    move_looks_off_zero(trainer.engine)
    trainer.step()
    trainer.step()
    trainer.save()
    opened = to_hf.open_checkpoint(out / "runs")
    lines = to_hf.convert(opened, out / "hf", dist.group.WORLD, quiet=True)
    assert any("no tokenizer" in line for line in lines)  # SentencePiece: none that loads
    return trainer.step()["train/lm_loss"]


def first_loss(scenes: Path, layout: dict, **start) -> tuple[float, dict]:
    trainer = new_trainer(digits_run(scenes, **layout, **start))
    trainer.loader.load_state_dict(trainer.loader.state_dict() | {"consumed_samples": 8})
    return trainer.step()["train/lm_loss"], trainer.notes


@pytest.mark.parametrize("name, size, layout", [("one", 1, {}), ("TP2xPP2", 4, TP2 | PP2)])
def test_training_goes_on(ranks, scenes, tmp_path, name, size, layout):
    expected = ranks(1, train_and_export, scenes, tmp_path)[0]
    live, notes = ranks(size, first_loss, scenes, layout | {"load_hf": str(tmp_path / "hf")})[0]
    # fp32 sums in another order on other layouts; from other weights it is off by 1e-2 and more
    assert live == pytest.approx(expected, abs=1e-5)
    other, _ = ranks(1, first_loss, scenes, {})[0]
    assert abs(other - expected) > 1e-2
    assert set(notes) == {"image_token_id", "tied"}


def test_two_starts_are_refused(scenes):
    with pytest.raises(ConfigError, match="load_hf is .a.; allowed: none, or this value without"):
        validate(digits_run(scenes, load_hf="a", load="b"))

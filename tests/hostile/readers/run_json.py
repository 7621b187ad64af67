"""The run.json of a checkpoint: other values under the right checksum, and damaged bytes."""

from __future__ import annotations

import random
from pathlib import Path

from megatron_mm.checkpoint import folders, sealed
from megatron_mm.errors import CheckpointError
from support.mutations import altered, damaged

NAME = "run_json"
ALLOWED = (CheckpointError,)
RUN = {
    "format": folders.FORMAT,
    "megatron_mm": "1.0",
    "iteration": 4,
    "identity": "0123456789abcdef" * 2,
    "layout": {"tp": 1, "pp": 2, "cp": 1, "ep": 1, "expert_tp": 1, "dp": 1},
    "adam_step": 4,
    "scheduler": {"max_lr": 1e-4, "num_steps": 16, "lr_decay_style": "cosine"},
    "loader": {"consumed_samples": 16, "inner": [1, 2, {"epoch": 0}]},
    "extra": {"seconds": 5.5, "huggingface": {"tied": False, "image_token_id": 7}},
    "config": {"model": {"hybrid_layer_pattern": "GE*E"}, "training": {"bf16": True}},
    "checksums": {".metadata": 5, "metadata.json": 6, "rng_00000.pt": 7},
}


def make(rng: random.Random, folder: Path) -> Path:
    """A folder of checkpoints with one in it."""
    path = folder / folders.name_of(RUN["iteration"])
    path.mkdir()
    run = {k: altered(rng, v, 0.02) for k, v in RUN.items() if rng.random() > 0.02}
    sealed.write_json(path / folders.RUN, run)
    for file, chance in ((path / folders.RUN, 0.4), (folder / folders.LATEST, 0.2)):
        if file.name == folders.LATEST:
            file.write_text(f"{path.name}\n")
        if rng.random() < chance:
            file.write_bytes(damaged(rng, file.read_bytes()))
    return folder


def read(folder: Path) -> None:
    """What is returned has the form that every caller relies on."""
    path, run = folders.resolve(folder)
    assert path.parent == folder and path.name == folders.name_of(run["iteration"])
    assert all(type(run[key]) is kind for key, kind in folders.KINDS.items())

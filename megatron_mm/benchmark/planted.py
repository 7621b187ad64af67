"""Supervised fine-tuning with gradients that are not numbers once a file says so (`faults.py`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_mm.config import RunConfig
from megatron_mm.train.declaration import SFT
from megatron_mm.train.sft import SupervisedFineTuning

NAN_FILE = "not_a_number"  # in the run's output folder; it is removed where it was seen
OBJECTIVE = "megatron_mm.benchmark.planted.PLANTED"


class Planted(SupervisedFineTuning):
    """The fault of a device, once: the next attempt at the same step is sound."""

    def __init__(self, run: RunConfig):
        super().__init__(run)
        self._file = Path(run.logging.output_dir) / NAN_FILE

    def loss(self, *step: Any) -> tuple[torch.Tensor, torch.Tensor]:
        total, count = super().loss(*step)
        if self._file.exists():
            self._file.unlink(missing_ok=True)
            total = total * float("nan")
        return total, count


PLANTED = replace(SFT, objective=f"{__name__}.Planted")

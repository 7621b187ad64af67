"""Supervised fine-tuning with gradients that are not numbers once a file says so (`faults.py`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm.config import RunConfig
from megatron_mm.data.batch import Microbatch
from megatron_mm.model.layers.output import Predictions
from megatron_mm.report.metrics import Metrics
from megatron_mm.train.declaration import SFT
from megatron_mm.train.sft import SupervisedFineTuning

NAN_FILE = "not_a_number"  # in the run's output folder; it is removed where it was seen
OBJECTIVE = "megatron_mm.benchmark.planted.PLANTED"


class Planted(SupervisedFineTuning):
    """The fault of a device, once: the next attempt at the same step is sound."""

    def __init__(self, run: RunConfig):
        super().__init__(run)
        self._file = Path(run.logging.output_dir) / NAN_FILE

    def loss(
        self,
        predictions: Predictions,
        batch: Microbatch,
        positions_K: torch.Tensor,
        pg: ProcessGroupCollection,
        metrics: Metrics,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, count = super().loss(predictions, batch, positions_K, pg, metrics)
        if self._file.exists():
            self._file.unlink(missing_ok=True)
            total = total * float("nan")
        return total, count


PLANTED = replace(SFT, objective=f"{__name__}.Planted")

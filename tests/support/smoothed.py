"""An objective of one's own, as a user would write it, and some that lack a part."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated

from megatron_mm.config.fields import Bounds
from megatron_mm.config.objectives import Declaration
from megatron_mm.train.sft import SupervisedFineTuning


@dataclass
class Smoothing:
    label_smoothing: Annotated[float, Bounds(ge=0, lt=1)] = 0.1
    """Share of a label's probability that is spread over all tokens."""


class LabelSmoothing(SupervisedFineTuning):
    def __init__(self, run):
        self.share = run.section(Smoothing).label_smoothing

    def loss(self, predictions, batch, positions_K, pg, metrics):
        mask_K = batch.loss_mask_T[positions_K]
        logits_KV = predictions.logits()  # of the whole vocabulary, on one tensor-parallel rank
        uniform = -(logits_KV.log_softmax(1).mean(1) * mask_K).sum()
        total, count = super().loss(predictions, batch, positions_K, pg, metrics)
        metrics.ratio("train/uniform_loss", uniform, count)
        return (1 - self.share) * total + self.share * uniform, count


SMOOTHED = Declaration("support.smoothed.LabelSmoothing", sections={"smoothing": Smoothing})


OWN_NAME = Declaration(
    "support.smoothed.LabelSmoothing",
    sections={"smoothing": Smoothing},
    console=("train/my_loss",),
)


@dataclass
class Clashing:
    lr: float = 1.0
    """Has the name of the optimizer's."""


CLASHING = Declaration("support.smoothed.LabelSmoothing", sections={"clashing": Clashing})


class WithoutLoss:
    router_term = None

    def __init__(self, run):
        self.run = run

    def positions(self, batch):
        return batch.loss_mask_T.nonzero().flatten()


LOSSLESS = Declaration("support.smoothed.WithoutLoss")
NOWHERE = Declaration("support.smoothed.Missing")
HALF = SimpleNamespace(objective="support.smoothed.LabelSmoothing")

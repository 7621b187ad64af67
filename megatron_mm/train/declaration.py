"""The declaration of supervised fine-tuning as an objective."""

from __future__ import annotations

from megatron_mm.config.objectives import Declaration
from megatron_mm.earl.checks import check_supervised_earl
from megatron_mm.earl.settings import EARLConfig

SFT = Declaration(
    "megatron_mm.train.sft.SupervisedFineTuning",
    sections={"earl": EARLConfig},
    check=check_supervised_earl,
)

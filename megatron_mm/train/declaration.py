"""The declaration of supervised fine-tuning as an objective."""

from __future__ import annotations

from megatron_mm.config.objectives import Declaration
from megatron_mm.config.settings import RunConfig
from megatron_mm.earl.checks import check_supervised_earl
from megatron_mm.earl.settings import EARLConfig
from megatron_mm.mimic.checks import check_mimic
from megatron_mm.mimic.settings import MimicConfig


def check_sft(run: RunConfig) -> None:
    """Raises ConfigError for settings of EARL or of mimic learning that do not fit."""
    check_supervised_earl(run)
    check_mimic(run)


SFT = Declaration(
    "megatron_mm.train.sft.SupervisedFineTuning",
    sections={"earl": EARLConfig, "mimic": MimicConfig},
    check=check_sft,
)

"""The declaration of training on preference pairs as an objective."""

from __future__ import annotations

from megatron_mm.config.objectives import Declaration
from megatron_mm.preference.settings import DPOConfig, check_dpo

DPO = Declaration(
    source="megatron_mm.preference.source.PairSteps",
    loader="megatron_mm.preference.loader.PairLoader",
    sections={"dpo": DPOConfig},
    check=check_dpo,
    console=("train/dpo_loss", "rewards/margins", "rewards/accuracies", "logps/chosen"),
)

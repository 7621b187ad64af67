"""The declaration of training on preference pairs as an objective."""

from __future__ import annotations

from megatron_mm.config.objectives import Declaration
from megatron_mm.preference.settings import DPOConfig, check_dpo
from megatron_mm.rl.reference_settings import ReferenceConfig

DPO = Declaration(
    source="megatron_mm.preference.source.PairSteps",
    loader="megatron_mm.preference.loader.PairLoader",
    sections={"dpo": DPOConfig, "reference": ReferenceConfig},
    check=check_dpo,
    console=("train/dpo_loss", "rewards/margins", "rewards/accuracies", "logps/chosen"),
    rows_when_packed=True,  # a step has as many pairs
    mean_over_tokens=False,
)

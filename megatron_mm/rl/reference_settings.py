"""The settings of a reference model that moves: a section that reinforcement learning and
preference pairs share. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_mm.config.fields import Bounds, PositiveInt
from megatron_mm.config.settings import RunConfig
from megatron_mm.errors import ConfigError


@dataclass
class ReferenceConfig:
    """How the reference model follows the policy. Names are TRL's."""

    sync_ref_model: bool = False
    """Move the reference model towards the policy every ref_model_sync_steps steps."""
    ref_model_mixup_alpha: Annotated[float, Bounds(gt=0, le=1)] = 0.6
    """Share of the policy in the moved reference: alpha * policy + (1 - alpha) * reference; below 1
    it is kept in fp32. 1: a copy."""
    ref_model_sync_steps: PositiveInt = 512
    """Optimizer steps between two moves of the reference model."""


def check_reference(run: RunConfig, needed: str | None) -> None:
    """Raises ConfigError for a reference that shall move where it cannot.

    Args:
        needed: what a run without a reference model lacks; None: it has one.
    """
    reference, adapters = run.section(ReferenceConfig), run.lora.lora_rank
    if not reference.sync_ref_model:
        return
    if needed is not None:
        raise ConfigError(
            f"reference.sync_ref_model is True; allowed: false, or true with {needed}"
        )
    if adapters is not None:  # A and B of the mean are not those of the mean of B A
        raise ConfigError(
            f"reference.sync_ref_model is True; allowed: false with lora_rank = {adapters}: a mean "
            "of adapters is not the mean of what they add"
        )

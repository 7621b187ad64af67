"""The settings of mimic learning: a section of supervised fine-tuning. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_mm.config.fields import Bounds, NonNegativeFloat, NonNegativeInt


@dataclass(kw_only=True)
class MimicConfig:
    """Learning from a teacher's routes and answers. Everything is off by default."""

    mimic_routes: str | None = None
    """A teacher's routes and answers for the training rows; tools/record_routes.py makes the file.
    Without a coefficient they are only compared with the student's."""
    mimic_map: str | None = None
    """Which layers and experts of the teacher stand for which of the student;
    tools/map_experts.py makes the file."""
    mimic_route_coeff: NonNegativeFloat = 0.0
    """Coefficient at the start of the cross entropy between the teacher's routes and the student's
    routers. 0.1 is a good value."""
    mimic_skill_coeff: NonNegativeFloat = 0.0
    """Coefficient at the start of the log mass of the skill's experts at labelled tokens; needs
    skill_map. Other tokens are left alone, unlike with router_align_coeff."""
    mimic_anneal_share: Annotated[float, Bounds(ge=0, le=1)] = 0.5
    """Share of train_iters over which both coefficients fall linearly to 0; 0: they are held."""
    mimic_kd_coeff: NonNegativeFloat = 0.0
    """Coefficient of the divergence of the student's next tokens from the teacher's, of the tokens
    that were recorded and of all others together. 1 is a good value."""
    mimic_map_shuffle_seed: NonNegativeInt | None = None
    """Control: the student's experts change places in the map at random, layer by layer."""
    mimic_row_shuffle_seed: NonNegativeInt | None = None
    """Control: each row has the routes of another one, chosen by this seed."""

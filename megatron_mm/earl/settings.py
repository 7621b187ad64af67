"""The settings of EARL: a section that fine-tuning and reinforcement learning share. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_mm.config.fields import NonNegativeFloat, NonNegativeInt, PositiveFloat


@dataclass(kw_only=True)
class EARLConfig:
    """Experts of their own for each skill, and what rewards them. Everything is off by default."""

    skill_map: str | None = None
    """JSON file that says which experts serve which skill; tools/discover_experts.py makes it."""
    skill_map_shuffle_seed: NonNegativeInt | None = None
    """Control: the experts of the map change places at random by this seed."""
    span_labels: str = "clauses"
    """Which tokens exercise which skill: clauses, whole, or the dotted path of a function."""
    on_missing_cluster: Literal["error", "skip"] = "error"
    """Treatment of spans whose skill is not in the map."""
    router_reward_weight: NonNegativeFloat = 0.0
    """Weight of the share of routes into the skill's experts beyond chance, as a reward."""
    router_loss_coeff: NonNegativeFloat = 0.0
    """Coefficient of the router term of the loss of completions. It weighs right spans by the
    completion's reward."""
    router_align_coeff: NonNegativeFloat = 0.0
    """Coefficient of the alignment term of supervised fine-tuning: the routers learn to send the
    tokens of a skill to its experts and all others to the common ones. 0.4 is a good value."""
    router_loss_clip: PositiveFloat = 2.0
    """Bound of the advantage in the router term of drawn experts (router_temperature)."""
    router_temperature: NonNegativeFloat = 0.0
    """Above 0, experts of completions are drawn (Gumbel top-k of the logits divided by it, arXiv
    1903.06059), and the router term is about those drawn. The gradient is about moe_router_topk /
    router_temperature times as strong."""
    span_credit: NonNegativeFloat = 0.0
    """Weight of a span's own answer in the advantage of its tokens."""

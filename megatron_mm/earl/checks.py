"""The checks of EARL's settings that need no map. Torch-free."""

from __future__ import annotations

from megatron_mm.config.settings import RunConfig
from megatron_mm.earl.settings import EARLConfig
from megatron_mm.errors import ConfigError

NEED_A_MAP = (
    *("router_reward_weight", "router_loss_coeff", "router_align_coeff"),
    "skill_map_shuffle_seed",
)
OF_COMPLETIONS = ("router_reward_weight", "router_loss_coeff", "router_temperature", "span_credit")


def check_earl(run: RunConfig) -> None:
    """Raises ConfigError for settings that need a skill map where none is given."""
    earl = run.section(EARLConfig)
    for key in NEED_A_MAP:
        value = getattr(earl, key)
        if value not in (0, None) and not earl.skill_map:
            raise ConfigError(
                f"earl.{key} is {value!r}; allowed: left out, or this value with skill_map"
            )


def check_policy_earl(run: RunConfig) -> None:
    """Raises ConfigError as `check_earl`, and for alignment, a term of supervised fine-tuning."""
    check_earl(run)
    coefficient = run.section(EARLConfig).router_align_coeff
    if coefficient:
        raise ConfigError(
            f"earl.router_align_coeff is {coefficient!r}; allowed: 0 with objective "
            f"{run.training.objective}; align in supervised fine-tuning, before"
        )


def check_supervised_earl(run: RunConfig) -> None:
    """Raises ConfigError as `check_earl`, and for settings that are about completions, of which
    supervised fine-tuning has none."""
    check_earl(run)
    earl = run.section(EARLConfig)
    for key in OF_COMPLETIONS:
        value = getattr(earl, key)
        if value:
            raise ConfigError(
                f"earl.{key} is {value!r}; allowed: 0 with objective {run.training.objective}, "
                "which draws no completions"
            )

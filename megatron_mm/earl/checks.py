"""The checks of EARL's settings that need no map. Torch-free."""

from __future__ import annotations

from megatron_mm.config.settings import RunConfig
from megatron_mm.earl.settings import EARLConfig
from megatron_mm.errors import ConfigError

NEED_A_MAP = (
    *("router_reward_weight", "router_loss_coeff", "router_align_coeff"),
    *("skill_map_shuffle_seed", "expert_scope"),
)
OF_COMPLETIONS = ("router_reward_weight", "router_loss_coeff", "router_temperature", "span_credit")


def check_earl(run: RunConfig) -> None:
    """Raises ConfigError for settings that need a skill map where none is given, and for a scope of
    experts that do not learn or whose dispatcher cannot carry it."""
    earl = run.section(EARLConfig)
    for key in NEED_A_MAP:
        value = getattr(earl, key)
        off = value is None or (key != "skill_map_shuffle_seed" and not value)  # 0 is a seed
        if not off and not earl.skill_map:
            raise ConfigError(
                f"earl.{key} is {value!r}; allowed: left out, or this value with skill_map"
            )
    for key in ("router_loss_coeff", "router_align_coeff"):
        check_routers_learn(run, f"earl.{key}", getattr(earl, key))
    if earl.expert_scope:
        _check_scope(run)


def check_routers_learn(run: RunConfig, key: str, coefficient: float) -> None:
    """Raises ConfigError for a term about routers that are frozen: its gradient would train the
    layers before them to move their choice."""
    if coefficient and not run.trains("router"):
        raise ConfigError(
            f"{key} is {coefficient!r}; allowed: 0 with freeze_router, or this value without"
        )


def _check_scope(run: RunConfig) -> None:
    if not run.trains("experts"):
        why = (
            f"freeze_experts is {run.training.freeze_experts} and lora_targets are "
            f"{run.lora.lora_targets if run.lora.lora_rank else []}"
        )
        raise ConfigError(
            "earl.expert_scope is True; allowed: false, or true where routed experts learn, but "
            f"{why}; LoRA on the language model freezes them"
        )
    dispatcher = run.parallel.moe_token_dispatcher_type
    if dispatcher != "alltoall":
        raise ConfigError(
            f"moe_token_dispatcher_type is {dispatcher!r}; allowed with earl.expert_scope: "
            "alltoall, which carries who teaches whom"
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

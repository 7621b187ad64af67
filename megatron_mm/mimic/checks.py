"""The checks of mimic learning's settings that need no file. Torch-free."""

from __future__ import annotations

from megatron_mm.config.settings import RunConfig
from megatron_mm.earl.checks import check_routers_learn
from megatron_mm.earl.settings import EARLConfig
from megatron_mm.errors import ConfigError
from megatron_mm.mimic.settings import MimicConfig

# What each setting needs beside it.
NEEDS = {
    "mimic_map": ("mimic_routes",),
    "mimic_route_coeff": ("mimic_routes", "mimic_map"),
    "mimic_kd_coeff": ("mimic_routes",),
    "mimic_map_shuffle_seed": ("mimic_map",),
    "mimic_row_shuffle_seed": ("mimic_routes", "mimic_map"),
}


def check_mimic(run: RunConfig) -> None:
    """Raises ConfigError for settings that need a file which is not named, and for two terms about
    the same skills."""
    mimic, earl = run.section(MimicConfig), run.section(EARLConfig)
    for key, needed in NEEDS.items():
        value = getattr(mimic, key)
        lacking = [name for name in needed if not getattr(mimic, name)]
        off = value is None or (key.endswith("coeff") and value == 0)
        if lacking and not off:
            raise ConfigError(
                f"mimic.{key} is {value!r}; allowed: left out, or this value with {lacking[0]}"
            )
    for key in ("mimic_route_coeff", "mimic_skill_coeff"):
        check_routers_learn(run, f"mimic.{key}", getattr(mimic, key))
    coefficient = mimic.mimic_skill_coeff
    if coefficient and not earl.skill_map:
        raise ConfigError(
            f"mimic.mimic_skill_coeff is {coefficient}; allowed: 0, or this value with skill_map"
        )
    if coefficient and earl.router_align_coeff:
        raise ConfigError(
            f"mimic.mimic_skill_coeff is {coefficient}; allowed: 0 with earl.router_align_coeff = "
            f"{earl.router_align_coeff}, which pulls the same tokens to the same experts"
        )

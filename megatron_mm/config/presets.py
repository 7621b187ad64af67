"""Named models. Each call returns a fresh object, so a caller may change what it got."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from megatron_mm.config.families import LANGUAGE_FAMILIES, VISION_FAMILIES
from megatron_mm.config.settings_model import ModelConfig, VisionConfig
from megatron_mm.errors import unknown


def preset(name: str) -> ModelConfig:
    """A whole model by name. Raises ConfigError with the names there are."""
    families = (family.presets for _, family in LANGUAGE_FAMILIES.items())
    return _made(families, "model preset", name)


def vision_preset(name: str) -> VisionConfig:
    """A vision encoder by name. Raises ConfigError with the names there are."""
    families = (family.presets for _, family in VISION_FAMILIES.items())
    return _made(families, "vision preset", name)


def _made[T](families: Iterator[Mapping[str, Callable[[], T]]], what: str, name: str) -> T:
    found: dict[str, Callable[[], T]] = {}
    for presets in families:
        found |= presets
    if name not in found:
        raise unknown(what, name, found)
    return found[name]()

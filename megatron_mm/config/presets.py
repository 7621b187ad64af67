"""Named models. Each call returns a fresh object, so a caller may change what it got."""

from __future__ import annotations

from collections.abc import Callable

from megatron_mm.config.families import LANGUAGE_FAMILIES, VISION_FAMILIES
from megatron_mm.config.settings_model import ModelConfig, VisionConfig
from megatron_mm.errors import unknown
from megatron_mm.plugins import Registry


def preset(name: str) -> ModelConfig:
    """A whole model by name. Raises ConfigError with the names there are."""
    return _made(LANGUAGE_FAMILIES, "model preset", name)


def vision_preset(name: str) -> VisionConfig:
    """A vision encoder by name. Raises ConfigError with the names there are."""
    return _made(VISION_FAMILIES, "vision preset", name)


def _made(registry: Registry, what: str, name: str) -> ModelConfig | VisionConfig:
    found: dict[str, Callable[[], ModelConfig | VisionConfig]] = {}
    for _, family in registry.items():
        found |= family.presets
    if name not in found:
        raise unknown(what, name, found)
    return found[name]()

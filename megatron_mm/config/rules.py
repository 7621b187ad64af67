"""Words of the checks: what does not divide, and what is not allowed."""

from __future__ import annotations

from typing import Any

from megatron_mm.errors import ConfigError


def divides(key: str, value: int, by_key: str, by: int) -> None:
    """Raises ConfigError unless `value` is a positive multiple of `by`."""
    if value < 1 or value % by:
        nearest = -(-max(value, 1) // by) * by
        raise ConfigError(
            f"{key} {value} does not divide by {by_key} {by}; "
            f"allowed: a multiple of {by}, such as {nearest}"
        )


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raises ConfigError with what is allowed if the condition does not hold."""
    if not condition:
        raise ConfigError(f"{key} is {value!r}; allowed: {allowed}")

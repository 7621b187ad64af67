"""The one exception a user of the configuration meets."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigError(ValueError):
    """A setting is wrong. The message is one line: the key, its value, and what is allowed."""


def unknown(what: str, name: object, allowed: Iterable[str]) -> ConfigError:
    """Builds the error for a name that is not in `allowed`: near misses first, else the list."""
    allowed = sorted(allowed)
    near = get_close_matches(str(name), allowed, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"allowed: {', '.join(allowed)}"
    return ConfigError(f"unknown {what} {name}; {hint}")

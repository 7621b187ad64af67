"""Every exception that a user meets. Each message is one line: what, where, the numbers that
disagree, what to change."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigError(ValueError):
    """A setting is wrong: the key, its value, and what is allowed."""


class DataError(ValueError):
    """Bad data or data settings, with the place (`file:row`, rows from 1)."""


class EndOfData(DataError):
    """Every sample of a finite run of phases was trained on."""


class RLError(ValueError):
    """A reward function, skill map or group cannot be used."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the same message on every rank."""


class ConvertError(CheckpointError):
    """A conversion cannot be done; names the tensor or the file."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not finite. Raised before the update, on every rank."""


def unknown(what: str, name: object, allowed: Iterable[str]) -> ConfigError:
    """Builds the error for a name that is not in `allowed`: near misses first, else the list."""
    allowed = sorted(allowed)
    near = get_close_matches(str(name), allowed, n=3, cutoff=0.6)
    hint = (
        f"did you mean {' or '.join(near)}?" if near else f"allowed: {', '.join(allowed) or 'none'}"
    )
    return ConfigError(f"unknown {what} {name}; {hint}")

"""Exceptions that users see. Each message is one line: what is wrong, where, the numbers that
disagree, what to change."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigError(ValueError):
    """A setting is wrong; names the key, its value and the allowed values."""


class DataError(ValueError):
    """Data or data settings are wrong; names the place (`file:row`, rows from 1)."""


class DecoderError(RuntimeError):
    """Images cannot be decoded on this machine, whatever their content."""


class EndOfData(DataError):
    """All samples of finite phases have been trained on."""


class RLError(ValueError):
    """A reward function, skill map or group cannot be used."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; raised on every rank with the same message."""


class ConvertError(CheckpointError):
    """A conversion cannot be done; names the tensor or the file."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not finite. Raised before the update, on every rank."""


def unknown(what: str, name: object, allowed: Iterable[str]) -> ConfigError:
    """Returns the error for an unknown name. It lists similar names, else all of `allowed`."""
    allowed = sorted(allowed)
    name = str(name)[:80]  # it may be anything, of any length
    near = get_close_matches(name, allowed, n=3, cutoff=0.6)
    hint = (
        f"did you mean {' or '.join(near)}?" if near else f"allowed: {', '.join(allowed) or 'none'}"
    )
    return ConfigError(f"unknown {what} {name}; {hint}")

"""Exceptions that users see. Each message is one line: what is wrong, where, the numbers that
disagree, what to change."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

MOST = 2000  # characters of a message


class OneLine(Exception):
    """An error whose text is one line of at most MOST characters, whatever it repeats of a row, a
    file or a reward: a long one loses its middle."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(_one_line(arg) if isinstance(arg, str) else arg for arg in args))


def _one_line(text: str) -> str:
    text = text.replace("\r", "\\r").replace("\n", "\\n")
    if len(text) <= MOST:
        return text
    return f"{text[: MOST - 500]} ... ({len(text)} characters) ... {text[-400:]}"


class ConfigError(OneLine, ValueError):
    """A setting is wrong; names the key, its value and the allowed values."""


class DataError(OneLine, ValueError):
    """Data or data settings are wrong; names the place (`file:row`, rows from 1)."""


class DecoderError(OneLine, RuntimeError):
    """Images cannot be decoded on this machine, whatever their content."""


class EndOfData(DataError):
    """All samples of finite phases have been trained on."""


class RLError(OneLine, ValueError):
    """A reward function, skill map or group cannot be used."""


class CheckpointError(OneLine, RuntimeError):
    """A checkpoint cannot be written or read; raised on every rank with the same message."""


class ConvertError(CheckpointError):
    """A conversion cannot be done; names the tensor or the file."""


class NonFiniteError(OneLine, RuntimeError):
    """The loss or the gradient is not finite. Raised before the update, on every rank."""


class DivergedError(RuntimeError):
    """Copies of a parameter differ between ranks. Raised on every rank."""


class LaunchError(RuntimeError):
    """This rank cannot join the job; other ranks may not know."""


def unknown(what: str, name: object, allowed: Iterable[str]) -> ConfigError:
    """Returns the error for an unknown name. It lists similar names, else all of `allowed`."""
    allowed = sorted(allowed)
    name = str(name)[:80]  # it may be anything, of any length
    near = get_close_matches(name, allowed, n=3, cutoff=0.6)
    hint = (
        f"did you mean {' or '.join(near)}?" if near else f"allowed: {', '.join(allowed) or 'none'}"
    )
    return ConfigError(f"unknown {what} {name}; {hint}")

"""Shared parts of the commands: log lines, the error line, exit codes. Imports no torch.

Modules log to `logging.getLogger(__name__)`. A command calls `setup_logging` once, before it does
anything that may log.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import unicodedata
from typing import NoReturn, TextIO

from megatron_mm.errors import ConfigError

EVERY_RANK = {"every_rank": True}  # `extra` of a message that other ranks do not repeat
PREFIX = {logging.WARNING: "warning: ", logging.ERROR: "error: "}
logger = logging.getLogger("megatron_mm")


def rank() -> int:
    """Rank of this process under torchrun, 0 outside it."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes that torchrun started, 1 outside it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def printable(text: str) -> str:
    """Returns text that cannot command a terminal: control and format characters (escape sequences,
    carriage returns, marks that turn the direction of writing) and what is no Unicode are spelled
    as in Python, `\\x1b`. Line breaks and tabs stay."""
    return "".join(c if c in "\n\t" or not _commands(c) else _spelled(c) for c in text)


def _commands(character: str) -> bool:
    # Cc control, Cf format, Cs half a pair, Zl and Zp line and paragraph separators
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _spelled(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def say(text: object, file: TextIO | None = None) -> None:
    """Prints text, whoever wrote it, to stdout or `file`."""
    print(printable(str(text)), file=file, flush=True)


class _Stderr(logging.Handler):
    """Writes one line per message to whatever `sys.stderr` is at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = PREFIX.get(record.levelno, "")
        # A line break in a message does not begin a line that looks like ours.
        say(f"{prefix}{record.getMessage()}".replace("\n", "\n  "), sys.stderr)


def setup_logging(rank: int) -> None:
    """Sends the package's log to stderr: all of rank 0, of other ranks errors and `EVERY_RANK`."""
    handler = _Stderr()
    handler.addFilter(
        lambda record: rank == 0 or record.levelno >= logging.ERROR or hasattr(record, "every_rank")
    )
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False  # other packages install handlers of the root logger


def fail(error: Exception) -> int:
    """Logs `error: ...` on rank 0, for an error that every rank raises. Returns the exit code: 2
    for wrong settings, else 1."""
    if rank() == 0:
        logger.error("%s", error)
    return 2 if isinstance(error, ConfigError) else 1


def flag(key: str) -> str:
    """Flag of a setting: `--max-new-tokens` for `max_new_tokens`."""
    return "--" + key.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """Parser of a command's own flags.

    Raises:
        ConfigError: instead of exiting, for wrong flags.
    """

    def __init__(self, description: str):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

"""Shared parts of the commands: log lines, the error line, exit codes. Imports no torch.

Modules log to `logging.getLogger(__name__)`. A command calls `setup_logging` once, before it does
anything that may log.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
import unicodedata
from pathlib import Path
from typing import NoReturn, TextIO

from megatron_mm.errors import ConfigError, LaunchError

EVERY_RANK = {"every_rank": True}  # `extra` of a message that other ranks do not repeat
# Signals that end a run in good order: of schedulers and torchrun, of a keyboard, of a terminal
# that closes, of `--signal=USR1@120`. They reach a rank's helpers, too, which share its group.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
PREFIX = {logging.WARNING: "warning: ", logging.ERROR: "error: "}
PATIENCE = 3.0  # seconds in which rank 0 says what is wrong everywhere, and torchrun ends the rest
logger = logging.getLogger("megatron_mm")


def rank() -> int:
    """Rank of this process under torchrun, 0 outside it."""
    return _number("RANK", 0)


def world_size() -> int:
    """Number of processes that torchrun started, 1 outside it."""
    return _number("WORLD_SIZE", 1)


def _number(variable: str, otherwise: int) -> int:
    """Returns a variable of torchrun's. What is no number is told when the job is joined."""
    try:
        return int(os.environ.get(variable, otherwise))
    except ValueError:
        return otherwise


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


def leave_stops_to_parent() -> None:
    """Ignores the signals that end a run: to the trainer they mean "save and stop", and until then
    it needs this helper, which ends when it does."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def say(text: object, file: TextIO | None = None) -> None:
    """Prints text, whoever wrote it, to stdout or `file`. A full disk or a closed pipe behind
    stdout is a warning; what `file` raises is its caller's."""
    try:
        print(printable(str(text)), file=file, flush=True)
    except (OSError, ValueError) as error:
        if file is not None:
            raise
        logger.warning("stdout cannot be written: %s", error)


class _Stderr(logging.Handler):
    """Writes one line per message to whatever `sys.stderr` is at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = PREFIX.get(record.levelno, "")
        # A line break in a message does not begin a line that looks like ours. A full disk or a
        # closed terminal: there is no one left to tell.
        with contextlib.suppress(OSError, ValueError):
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


def fail(error: Exception, joined: bool = True) -> int:
    """Logs `error: ...`: on rank 0 what every rank raises, on each that it cannot join the job.
    Returns the exit code: 2 for wrong settings, else 1.

    Args:
        joined: whether the ranks have joined, so that all raise the same. Before, another rank than
            0 may be the only one: it waits until rank 0 would have said it, and torchrun ended the
            rest, then says it itself.
    """
    if rank() == 0 or isinstance(error, LaunchError):
        logger.error("%s", error)
    elif not joined:
        time.sleep(PATIENCE)
        logger.error("rank %d: %s", rank(), error)
    return 2 if isinstance(error, ConfigError) else 1


def one_line(error: BaseException) -> str:
    """Returns the type of an exception and the beginning of what it says."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def let_go() -> None:
    """Throws away what stdout and stderr could not take, before the interpreter tries once more and
    makes an exit status of it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def flag(key: str) -> str:
    """Flag of a setting: `--max-new-tokens` for `max_new_tokens`."""
    return "--" + key.replace("_", "-")


def path(text: str) -> Path:
    """Type of an argument that is a path: an empty one would be the current folder."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path")
    return Path(text)


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

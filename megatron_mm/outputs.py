"""Files that commands write: known to be writable before the work begins, and whole or as they
were, whenever their writer is killed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_mm.errors import ConfigError


def check_writable(path: Path | None, flag: str, error: type[ValueError] = ConfigError) -> None:
    """Makes the folder of a file that is to be written; None: there is none.

    Raises:
        error: the file cannot be written.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as problem:
        raise error(
            f"{flag} {path} cannot be written: {problem.strerror}; allowed: a file in a folder "
            "that can be written"
        ) from None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Makes the folder of a file and yields the name to write it under, beside its own. At the end
    the file gets its own name in one move. If the block fails, what it wrote is removed, and an
    earlier file of that name stays. A power failure may still lose the move; files of a checkpoint
    are synced (checkpoint/sealed.py).

    Raises:
        OSError: the folder cannot be made, or the file cannot be moved.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes values to a file, or to whatever the path names: `/dev/stdout` has no whole file."""
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

"""Files that are whole or as they were, whenever their writer is killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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

"""Files that commands write: whole or not there, and one that grows round by round.

A file that grows is FILE.partial beside FILE.progress, which says how much of it holds. Whatever
ends the command, the next one cuts off what came later and goes on there.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from megatron_mm.checkpoint import sealed
from megatron_mm.checkpoint.lock import BUSY, WITHOUT
from megatron_mm.errors import CheckpointError, DataError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes an OSError of the body a DataError that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from None


def check_new(path: Path) -> None:
    """Raises DataError for a file that is there, or of which that cannot be known."""
    with writing(path):
        there = path.exists()
    if there:
        raise DataError(f"{path} is there already; remove it, or name another --out")


class NewFiles:
    """New files of lines, written as the lines come. Used as a context: at its end all are whole;
    if its body raises, none is there. A file without a line is not made.

    Attributes:
        lines: of each file so far.

    Raises:
        DataError: a file is there already or cannot be written.
    """

    def __init__(self, paths: Iterable[Path]):
        self.lines = dict.fromkeys(paths, 0)
        self._open: dict[Path, BinaryIO] = {}
        for path in self.lines:
            check_new(path)

    def add(self, path: Path, line: str) -> None:
        with writing(path):
            if path not in self._open:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._open[path] = _partial(path).open("wb")
            self._open[path].write(line.encode() + b"\n")
        self.lines[path] += 1

    def __enter__(self) -> NewFiles:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                for path, file in self._open.items():
                    with writing(path):
                        file.flush()
                        os.fsync(file.fileno())
                for path in self._open:
                    with writing(path):
                        _partial(path).replace(path)
        finally:
            for path, file in self._open.items():
                with suppress(OSError):  # it was said, or the file is whole
                    file.close()
                _partial(path).unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


@dataclass
class Tally:
    """The state of a command between two rounds.

    Attributes:
        rows: read, those that were left out among them.
        sums: by name.
        columns: names that any of the rows had, where rewards are given them.
    """

    rows: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)

    def add(self, rows: int, sums: Mapping[str, float], columns: Iterable[str] = ()) -> None:
        self.rows += rows
        self.columns = sorted({*self.columns, *columns})
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value


class Growing:
    """A file of lines that grows round by round, held by one process. Close it.

    Attributes:
        tally: of the rounds that it holds.
        done: whether an earlier command finished it.

    Raises:
        DataError: at construction: the file is there already and not this command's, another
            process writes it, or what is there is of other settings.
    """

    def __init__(self, path: Path, key: str):
        """
        Args:
            key: digest of all that the lines depend on.
        """
        self.path, self._key, self.tally, self.done = path, key, Tally(), False
        self._file: BinaryIO | None = None
        self._partial, self._progress = (
            path.with_name(path.name + end) for end in (".partial", ".progress")
        )
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            held = self._held()
            # A command that was killed between its last two steps has left one without the other.
            if path.exists() and held is not None and not self._partial.exists():
                self.tally, self.done = held[1], True
                self._progress.unlink()
                return
        check_new(path)
        with writing(self._partial):
            self._file = self._partial.open("ab")
            try:
                self._hold()
                size, self.tally = held or (0, Tally())
                there = os.fstat(self._file.fileno()).st_size
                if there < size:
                    raise DataError(
                        f"{self._partial} has {there} bytes, {self._progress} says {size}; remove "
                        "both"
                    )
                self._file.truncate(size)
                self._file.seek(size)  # or a round without lines would note the old end
            except BaseException:
                self.close()
                raise

    def _held(self) -> tuple[int, Tally] | None:
        """Returns how many bytes hold, and the tally of them; None without a beginning."""
        if not self._progress.exists():
            return None
        try:
            content = sealed.read_json(self._progress)
            key, size = content["key"], content["bytes"]
            tally = Tally(content["rows"], content["sums"], content["columns"])
        except (CheckpointError, OSError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{self._progress} cannot be read ({reason}); remove it") from None
        if key != self._key:
            raise DataError(
                f"{self._partial} was begun with another checkpoint, other data or settings; go on "
                "with those, remove it and its .progress, or name another --out"
            )
        return size, tally

    def _hold(self) -> None:
        assert self._file is not None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in BUSY:
                raise DataError(
                    f"another process writes {self._partial}; wait for it, or name another --out"
                ) from None
            if error.errno not in WITHOUT:  # a file system that has no locks
                raise

    def append(
        self,
        lines: Sequence[str],
        rows: int,
        sums: Mapping[str, float],
        columns: Iterable[str] = (),
    ) -> None:
        """Adds the lines of a round: they are on disk when it returns, or will be cut off.

        Args:
            rows: that were read for them; sums, columns: to be added to the tally.
        Raises:
            DataError: they cannot be written.
        """
        assert self._file is not None, "the file is finished"
        with writing(self._partial):
            self._file.write("".join(f"{line}\n" for line in lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
            size = self._file.tell()
        self.tally.add(rows, sums, columns)
        content: dict[str, Any] = {"key": self._key, "bytes": size}
        content |= {"rows": self.tally.rows, "sums": self.tally.sums}
        content["columns"] = self.tally.columns
        fresh = self._progress.with_name(self._progress.name + ".new")
        with writing(self._progress):
            sealed.write_json(fresh, content)
            fresh.replace(self._progress)
            sealed.sync_folder(self.path.parent)

    def finish(self) -> None:
        """Gives the file its name."""
        if self.done:
            return
        with writing(self.path):
            self._partial.replace(self.path)
            sealed.sync_folder(self.path.parent)
            self._progress.unlink(missing_ok=True)
        self.done = True

    def close(self) -> None:
        """Lets go of the file."""
        if self._file is not None:
            with suppress(OSError):  # what could not be written was said already
                self._file.close()
            self._file = None

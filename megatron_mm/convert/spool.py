"""Writes files in a background thread, so that reading and rearranging continue meanwhile.

Content is copied into one of a few reused buffers and written from there, bypassing the page cache
(O_DIRECT) where the file system allows it. Both are for speed: fresh memory and fresh pages of the
cache are cleared, mapped and accounted page by page, which costs more than the copy
(examples/benchmarks/log.md).
"""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import AbstractContextManager
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

PIECE = 16 * 2**20  # bytes of a buffer
PIECES = 3  # one being filled, one being written, one waiting
# Alignment of direct writes in bytes: no disk has larger sectors.
ALIGNED = 4096


class OutFile:
    """Existing or new file that is written at any offset."""

    def __init__(self, path: Path):
        self._cached = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._direct: int | None = None
        try:
            self._direct = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the file system has no direct writes
                self.close()
                raise

    def write(self, content: memoryview, at: int) -> None:
        """Writes at byte `at`. `content` has the same alignment in memory as `at` in the file."""
        begin = min(-at % ALIGNED, len(content))
        end = max(begin, len(content) - (at + len(content)) % ALIGNED)
        self._write(self._cached, content[:begin], at)
        if self._direct is not None:
            try:
                self._write(self._direct, content[begin:end], at + begin)
                begin = end
            except OSError as error:
                if error.errno != errno.EINVAL:  # it needs a larger alignment
                    raise
                os.close(self._direct)
                self._direct = None
        self._write(self._cached, content[begin:], at + begin)

    def _write(self, handle: int, content: memoryview, at: int) -> None:
        done = 0
        while done < len(content):
            done += os.pwrite(handle, content[done:], at + done)

    def sync(self) -> None:
        os.fsync(self._cached)

    def close(self) -> None:
        for handle in (self._cached, self._direct):
            if handle is not None:
                os.close(handle)


class Spool(AbstractContextManager):
    """Background writer. `finish` makes the files durable; leaving the context closes them.

    The next `write` or `finish` raises an error of the thread. Content after the error is dropped.
    """

    def __init__(self):
        self._files: list[OutFile] = []
        self._free: SimpleQueue[mmap.mmap] = SimpleQueue()
        self._full: SimpleQueue[tuple[mmap.mmap, OutFile, int, int, int] | None] = SimpleQueue()
        for _ in range(PIECES):
            self._free.put(mmap.mmap(-1, PIECE))  # page-aligned; takes memory when touched
        self._error: Exception | None = None
        # The buffer being filled, its file, the range filled, and the range's offset in the file.
        self._piece: mmap.mmap | None = None
        self._file: OutFile | None = None
        self._begin = self._end = self._at = 0
        self._thread: Thread | None = None  # started with the first full buffer

    def open(self, path: Path) -> OutFile:
        file = OutFile(path)
        self._files.append(file)
        return file

    def write(self, file: OutFile, content: memoryview, at: int) -> None:
        """Copies `content`, to be written at byte `at`.

        Raises:
            OSError: an earlier write failed.
        """
        while content:
            follows = file is self._file and at == self._at + self._end - self._begin
            if self._piece is not None and (self._end == PIECE or not follows):
                self._send()
            if self._piece is None:
                self._piece, self._file, self._at = self._free.get(), file, at
                self._begin = self._end = at % ALIGNED
            taken = min(len(content), PIECE - self._end)
            self._piece[self._end : self._end + taken] = content[:taken]
            self._end += taken
            content, at = content[taken:], at + taken
        self._check()

    def finish(self) -> None:
        """Waits until everything is on disk.

        Raises:
            OSError: a write failed.
        """
        self._stop()
        self._check()
        for file in self._files:
            file.sync()

    def __exit__(self, *_) -> None:
        self._stop()
        for file in self._files:
            file.close()
        self._files.clear()

    def _stop(self) -> None:
        self._send()
        if self._thread is not None:
            self._full.put(None)
            self._thread.join()
            self._thread = None

    def _send(self) -> None:
        if self._piece is not None:
            if self._thread is None:
                self._thread = Thread(target=self._run, name="spool", daemon=True)
                self._thread.start()
            assert self._file is not None  # it is set with the piece
            self._full.put((self._piece, self._file, self._begin, self._end, self._at))
            self._piece = self._file = None

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (full := self._full.get()) is not None:
            piece, file, begin, end, at = full
            if self._error is None:
                try:
                    file.write(memoryview(piece)[begin:end], at)
                except Exception as error:  # of any kind: `write` waits for a buffer
                    self._error = error
            self._free.put(piece)

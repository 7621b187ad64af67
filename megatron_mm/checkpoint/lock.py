"""Keeps a second job out of a folder of checkpoints.

Two jobs in one folder would delete each other's unfinished saves and prune each other's
checkpoints. The lock is a POSIX record lock (fcntl(2)): the kernel ends it with the process,
however that dies, and, unlike flock's, forked children do not hold it on. The file says who has it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from megatron_mm.checkpoint.collective import raising_together
from megatron_mm.checkpoint.plain_pickle import shown
from megatron_mm.errors import CheckpointError

logger = logging.getLogger(__name__)

NAME = ".lock"
BUSY = (errno.EACCES, errno.EAGAIN)
# What fcntl says where a file system has no locks.
WITHOUT = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Lock:
    """A held folder, which is made if it is missing.

    Raises:
        CheckpointError: another process holds it.
        OSError: nothing can be written there.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / NAME
        while True:
            # The folder may be a stranger's: its `.lock` could be a link to any file.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            handle = os.open(self._path, flags, 0o666)
            self._file = os.fdopen(handle, "r+", encoding="utf-8", errors="backslashreplace")
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                with self._file:
                    if error.errno in BUSY:
                        owner = shown(self._file.read(200).strip() or "another process")
                        raise CheckpointError(
                            f"another job saves to {folder}: {owner}; stop it, or give this one "
                            f"another folder; if its machine is surely down, delete {self._path}"
                        ) from None
                if error.errno not in WITHOUT:
                    raise
                logger.warning(
                    "the file system of %s has no locks: nothing keeps a second job out", folder
                )
                return
            if self._is_there():
                break
            self._file.close()  # its owner has just removed it
        self._file.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        self._file.flush()

    def _is_there(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        return False

    def release(self) -> None:
        """Lets other jobs in. Harmless if it was called before."""
        if not self._file.closed:
            with contextlib.suppress(OSError):
                if self._is_there():
                    self._path.unlink()
            self._file.close()


def hold(folder: Path | None, group: dist.ProcessGroup) -> Lock | None:
    """Holds the folder that a job saves to, on rank 0. Every rank calls it.

    Args:
        group: gloo group of all ranks.

    Raises:
        CheckpointError: on every rank; another job holds it, nothing can be written there, or
            ranks name different folders.
    """
    said: list[str | None] = [None] * group.size()
    dist.all_gather_object(said, None if folder is None else str(folder), group=group)
    for rank, other in enumerate(said):
        if other != said[0]:
            raise CheckpointError(
                f"ranks save to different folders: rank 0 to {said[0] or 'none'}, rank {rank} to "
                f"{other or 'none'}; give all the same --save"
            )
    lock = None
    with raising_together(group, f"cannot save to {folder}"):
        if folder is not None and group.rank() == 0:
            lock = Lock(folder)
    return lock


@contextmanager
def held(folder: Path, group: dist.ProcessGroup) -> Iterator[None]:
    """Holds a folder while the body runs. Every rank calls it."""
    lock = hold(folder, group)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()

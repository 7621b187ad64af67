"""The processes below a process, their memory, and their end.

Whoever runs other people's code must be able to end all that it started. A process group is not
enough: a child may leave it (setsid). A process that adopts orphans (`adopt_orphans`) keeps all of
its descendants below it, and then /proc names them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
ROUNDS = 100  # of looking for processes that were started while others were ended


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_with(parent: int) -> None:
    """Has the kernel kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before prctl
        os._exit(1)


def descendants(pid: int) -> list[int]:
    """Returns the living processes below a process, parents first."""
    found: list[int] = []
    left = [pid]
    while left:
        children = _children(left.pop(0))
        found += children
        left += children
    return found


def _children(pid: int) -> list[int]:
    """Returns the children of a process that still run; of all its threads."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += [int(word) for word in (thread / "children").read_text().split()]
    return [child for child in found if _runs(child)]


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"


def end(pid: int, spared: Iterable[int] = ()) -> None:
    """Kills the processes below a process, also those that they start meanwhile.

    Args:
        spared: processes that are left alone; their children are not, unless they are listed.
    """
    kept = set(spared)
    for _ in range(ROUNDS):
        others = [found for found in descendants(pid) if found not in kept]
        if not others:
            return
        for found in others:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(found, signal.SIGKILL)


def memory_of(pids: Sequence[int], enough: int) -> int:
    """Returns the bytes that processes hold in memory. What several share is counted once where
    the sum would be more than `enough`: telling it apart takes the kernel milliseconds."""
    page = resource.getpagesize()
    total = sum(page * _number(f"/proc/{pid}/statm", 1) for pid in pids)
    if total <= enough:
        return total
    return sum(1024 * _number(f"/proc/{pid}/smaps_rollup", "Pss:") for pid in pids)


def _number(path: str, which: int | str) -> int:
    """Returns a number of a file of /proc, by its place or by the word before it; 0 if the process
    has ended."""
    try:
        words = Path(path).read_text().split()
        return int(words[which if isinstance(which, int) else words.index(which) + 1])
    except (OSError, ValueError, IndexError):
        return 0


def limit_memory(size: int) -> None:
    """Lets this process, and each that it starts, allocate at most `size` bytes; beyond that Python
    raises MemoryError. The kernel, out of memory, takes this process before others."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    size = size if hard == resource.RLIM_INFINITY else min(size, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")

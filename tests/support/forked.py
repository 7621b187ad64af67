"""A server that has imported everything but made no thread and no group, and forks processes that
tests kill (`multiprocessing`'s forkserver): such a process lives within a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.context import BaseContext

VICTIMS = [
    "support.checkpoint_victims",
    "support.rl_victim",
]  # modules; those that a run of tests cannot see are left out


def context() -> BaseContext:
    """Processes of it are forked from the server, which the first call starts."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(VICTIMS)
    before = os.environ.get("PYTHONPATH")
    # Python 3.12 does not hand sys.path to the server, which then preloads nothing, silently.
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return found


def is_clean(server: int) -> bool:
    """Whether this process was forked from a server that imported what runs here, `server` being
    the process of that import, and that has no threads."""
    return os.getpid() != server and len(os.listdir(f"/proc/{server}/task")) == 1

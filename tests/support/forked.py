"""A server that forks processes for tests to kill (`multiprocessing`'s forkserver).

It has imported everything but started no thread and no process group, so such a process is ready
within a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.context import BaseContext

VICTIMS = ["support.checkpoint_victims", "support.rl_victim"]  # modules that it imports


def context() -> BaseContext:
    """Returns the context whose processes are forked from the server; the first call starts it."""
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
    """Returns whether this process was forked from one that imported its code and has no threads.

    Args:
        server: the id of the process that imported the calling module.
    """
    return os.getpid() != server and len(os.listdir(f"/proc/{server}/task")) == 1

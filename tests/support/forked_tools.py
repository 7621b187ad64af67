"""The conversion tools in processes that tests can kill.

They are forked from a server that has imported everything and has no threads: started afresh, each
would spend ten seconds on its imports. Run as a program, this file is that server. It reads a line
of JSON for each run and writes a line when the child has ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from support.tools import load_tool

ROOT = Path(__file__).parent.parent.parent
TOOLS = ("hf_to_megatron", "megatron_to_hf")
# The functions of os that change what a reader finds on disk.
CHANGES = (
    *("mkdir", "open", "posix_fallocate", "pwrite", "fsync"),
    *("rename", "replace", "unlink", "rmdir"),
)


class Tools:
    """Runs the tools one at a time, and kills them at the moment that a test names."""

    def __init__(self):
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
                "OMP_NUM_THREADS": "1",
                "TQDM_DISABLE": "1",
            },
        )

    def run(
        self, tool: str, *args, die_at: int = 0, kill_after: float | None = None
    ) -> tuple[int, int]:
        """Runs a tool to its end or to its kill.

        Args:
            die_at: the number of the change on disk, counted from 1, in whose place it is killed.
            kill_after: the number of seconds after its start when it is killed.

        Returns:
            The exit status, -9 if it was killed, and the number of its changes, 0 if it was killed.
        """
        words = [tool, [str(arg) for arg in args], die_at, kill_after]
        self._server.stdin.write(json.dumps(words) + "\n")
        self._server.stdin.flush()
        line = self._server.stdout.readline()
        assert line, "the process that forks is dead"
        status, changes = json.loads(line)
        return status, changes

    def stop(self) -> None:
        self._server.stdin.close()
        assert self._server.wait(timeout=30) == 0


def _count_changes(die_at: int) -> list[int]:
    count = [0]

    def counted(function):
        def change(*args, **kwargs):
            count[0] += 1
            if count[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return change

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    return count


def _child(main, args: list[str], die_at: int, answer: int) -> None:
    from megatron_mm.convert import spool

    status = 99
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        spool.PIECE = 16 * spool.ALIGNED  # else a small model is written at once
        count = _count_changes(die_at)
        status = main(args)
        os.write(answer, str(count[0]).encode())
    finally:
        os._exit(status)


def _serve() -> None:
    mains = {}
    for tool in TOOLS:
        module = load_tool(tool)
        mains[tool] = module.main
        module.main(["--nonsense"])  # imports what it needs, and finds the flags wrong
    import torch._dynamo  # noqa: F401 (what the tools import as they go)
    from transformers import InternVLConfig, Qwen3NextConfig  # noqa: F401

    assert len(os.listdir("/proc/self/task")) == 1, "a child would lack these threads"
    for line in sys.stdin:
        tool, args, die_at, kill_after = json.loads(line)
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            _child(mains[tool], args, die_at, theirs)
        os.close(theirs)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)  # not reaped yet, so its number is still its own
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with os.fdopen(ours) as answer:
            print(json.dumps([status, int(answer.read() or 0)]), flush=True)


if __name__ == "__main__":
    _serve()

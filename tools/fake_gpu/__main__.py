"""Runs a command with a GPU that is not there: `python -m tools.fake_gpu -m MODULE ARGUMENTS`, or a
script's path in place of `-m MODULE`. Then says on stderr what was launched and what waited."""

from __future__ import annotations

import atexit
import os
import runpy
import sys

from tools.fake_gpu import install

USAGE = "usage: python -m tools.fake_gpu (-m MODULE | SCRIPT) [ARGUMENTS]"


def main(words: list[str]) -> int | None:
    if not words or words[0] in ("-h", "--help") or words == ["-m"]:
        print(__doc__, USAGE, sep="\n\n")
        return None if words[:1] in (["-h"], ["--help"]) else 2
    gpu = install()
    if os.environ.get("RANK", "0") == os.environ.get("FAKE_GPU_REPORT_RANK", "0"):
        atexit.register(lambda: print(gpu.recorder.counts.report(), file=sys.stderr))
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        runpy.run_path(words[0], run_name="__main__")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

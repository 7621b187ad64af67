"""Launches as a user makes them, in processes of their own."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ALONE = [sys.executable, "-m", "megatron_mm.train"]
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    *("-m", "megatron_mm.train"),
]
TIMEOUT = 120  # seconds; a launch takes about 6 on two idle cores


def environment() -> dict[str, str]:
    """Returns this process's variables without those of an outer launch."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def launch(command: list[str], *flags: object) -> subprocess.CompletedProcess:
    """Runs the command with these flags from the root of the checkout."""
    return subprocess.run(
        [*command, *map(str, flags)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip


def free_port() -> int:
    """Returns a port below those that the system gives to connections, which gloo's would take."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port

"""How many files and sockets a process may hold open, and how many a rank of a job needs.

Linux gives a process 1,024 unless it asks for more. gloo connects two ranks of a group when they
first exchange something, so a group costs up to its size in sockets; the agent that holds the
rendezvous has one for every rank.
"""

from __future__ import annotations

import resource

# Of a rank: libraries, data, pipes to workers, NCCL; a small run on four CPU ranks holds about 75.
OTHERS = 512


def raise_limit() -> int:
    """Allows this process, and those it starts, all that the system lets it have. Returns the
    number of descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def needed(world_size: int) -> int:
    """Descriptors that a rank of `world_size` needs at most: both gloo groups of
    `groups.Groups`, each with a connection to every rank, and `OTHERS`."""
    return 2 * world_size + OTHERS


def problem(limit: int, world_size: int) -> str | None:
    """Says what is wrong with a limit and what to change; None if it is enough."""
    if limit >= needed(world_size):
        return None
    return (
        f"a process may open {limit:,} files and sockets, {world_size:,} ranks need "
        f"{needed(world_size):,}; raise the hard limit there (ulimit -Hn, LimitNOFILE of systemd, "
        "nofile of limits.conf)"
    )

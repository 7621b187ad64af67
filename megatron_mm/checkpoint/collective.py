"""Errors raised on every rank or on none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mm.errors import CheckpointError


def one_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # torch's own agreement: rank -> (error, traceback)
        error = min(error.failures.items())[1][0]
    text = " ".join(str(error).split())
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"


@contextmanager
def raising_together(group: dist.ProcessGroup, doing: str) -> Iterator[None]:
    """What fails inside on any rank of a gloo group raises CheckpointError on all of them after.

    The block must not wait for other ranks, unless what it calls fails on all ranks at once.
    """
    cause = problem = None
    try:
        yield
    # Whatever it was, the other ranks wait to hear of it. torch's is no Exception (api.py:25).
    except (Exception, CheckpointException) as error:
        cause, problem = error, one_line(error)
    problems: list[str | None] = [None] * group.size()
    dist.all_gather_object(problems, problem, group=group)
    failed = [rank for rank, found in enumerate(problems) if found]
    if not failed:
        return
    where = "" if len(set(problems)) == 1 else f" (rank {failed[0]}"
    where += f", {len(failed)} of {len(problems)} ranks failed)" if where else ""
    raise CheckpointError(f"{doing}: {problems[failed[0]]}{where}") from cause

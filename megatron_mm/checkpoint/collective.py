"""Errors raised on every rank or on none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mm.errors import CheckpointError


def one_line(error: BaseException) -> str:
    """Returns the message in one line, with the type of errors that are not ours."""
    if isinstance(error, CheckpointException):  # collected by torch: rank -> (error, traceback)
        error = min(error.failures.items())[1][0]
    text = " ".join(str(error).split())
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"


@contextmanager
def raising_together(group: dist.ProcessGroup, doing: str) -> Iterator[None]:
    """Raises an error of any rank as a CheckpointError on every rank when the body ends.

    The body must not wait for other ranks, unless what it calls fails on all of them.

    Args:
        group: gloo group of the ranks that enter together.
        doing: what failed, the beginning of the message.
    """
    cause = problem = None
    try:
        yield
    # Other ranks wait for any outcome. torch's error is not an Exception (api.py:25).
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

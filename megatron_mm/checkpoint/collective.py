"""Errors raised on every rank or on none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def check_same(group: dist.ProcessGroup, path: Path, identity: str) -> None:
    """Checks that every rank has found the same checkpoint. Every rank calls it.

    Raises:
        CheckpointError: on every rank, for two checkpoints: a run is saving there, or a shared
            folder looks different on two nodes.
    """
    found: list[tuple[str, str]] = [("", "")] * group.size()
    dist.all_gather_object(found, (identity, str(path)), group=group)
    other = next((rank for rank, (its, _) in enumerate(found) if its != found[0][0]), None)
    if other is not None:
        raise CheckpointError(
            f"ranks 0 and {other} found different checkpoints, {found[0][1]} and "
            f"{found[other][1]}: is a run saving there? Name one of them"
        )

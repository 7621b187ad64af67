"""Stops a run whose rewards fail, as supervised training does when every row is left out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_mm.engine.engine import Engine
from megatron_mm.errors import DataError
from megatron_mm.parallel.groups import Groups
from megatron_mm.rl.rollout.score import Scored, totals


def check_rewards(
    engine: Engine,
    scored: Scored,
    weights: Sequence[float],
    of_group: Sequence[int],
    steps: int,
    most: float,
    others: bool,
) -> None:
    """Stops where a step has too few rewards. Every rank of the job calls it.

    Args:
        weights: of the reward functions. One of weight 0 may fail as it likes.
        of_group: the step of each of this replica's groups, 0 to steps - 1.
        most: share of a step's completions, above 0 to 1, whose rewards may not fail; see
            `max_reward_failures`.
        others: whether the run can do without the functions' rewards.
    Raises:
        DataError: on every rank, with the first failure, if that share of a step's completions
            failed; or if no reward of weight applies to any completion of a step.
    """
    if not weights:
        return
    counts_C = torch.tensor(weights) != 0
    failed_P = (scored.failed_PGC & counts_C).any(2).sum(1)
    kept_P = (~totals(scored, weights).isnan()).sum(1)
    sums_S3 = torch.zeros(steps, 3, dtype=torch.int64)  # completions, failed, kept
    groups = engine.groups
    if groups.is_reader and len(of_group):
        size = scored.rewards_PGC.shape[1]
        mine_P3 = torch.stack((torch.full_like(failed_P, size), failed_P, kept_P), 1)
        sums_S3.index_add_(0, torch.tensor(of_group), mine_P3)
    dist.all_reduce(sums_S3, group=groups.world)
    for count, failed, kept in sums_S3.tolist():
        if not count:
            continue
        if failed >= most * count:
            said = "every reward" if failed == count else f"{failed} of {count} rewards"
            first = _first_reason(groups, scored)
            raise DataError(f"{said} of a step failed, the first because: {first}")
        if not kept and not others:
            names = ", ".join(n for n, w in zip(scored.names, weights, strict=True) if w)
            raise DataError(
                f"no reward applied to any of the {count} completions of a step: {names} returned "
                "None for each; is the column that it compares with (ground_truth) empty?"
            )


def _first_reason(groups: Groups, scored: Scored) -> str:
    """Why a reward failed on the first replica where one did."""
    parts: list = [None] * groups.world.size()
    mine = scored.failures[:1] if groups.is_reader else ()
    dist.all_gather_object(parts, mine, group=groups.world)
    return next((reason for some in parts for reason in some), "no reason was given")

"""Collects the groups that a rollout trains on, in rounds, until there are enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_mm.config import RunConfig
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.earl.alignment import Alignment
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import broadcast_from_reader
from megatron_mm.errors import DataError
from megatron_mm.parallel.agreement import everyone, largest
from megatron_mm.rl.rollout.draw import draw_rollout
from megatron_mm.rl.rollout.failures import check_rewards
from megatron_mm.rl.rollout.prompts import PromptSource
from megatron_mm.rl.rollout.score import Scored, Scorer, informative, join
from megatron_mm.rl.settings import records_routes, resolved, rollout_plan, teacher_folders


@dataclass(frozen=True)
class Steps:
    """The optimizer steps of a rollout's first pass.

    Attributes:
        of_group: for each group of this replica, the step that it serves.
        count: the number of steps, the same on every rank.
    """

    of_group: tuple[int, ...]
    count: int


class Collector:
    """Draws, scores and chooses the groups of a rollout. Close it."""

    def __init__(
        self,
        run: RunConfig,
        engine: Engine,
        tokenizer: Tokenizer,
        loader: PromptSource,
        alignment: Alignment | None,
    ):
        self.engine, self.tokenizer, self.loader = engine, tokenizer, loader
        self.rl, self.plan = resolved(run), rollout_plan(run)
        self.scorer = Scorer(self.rl, engine, tokenizer, alignment, loader.columns)
        self.record_routes = records_routes(self.rl, self.scorer.wants_routes)

    def close(self) -> None:
        """Ends the reward workers."""
        self.scorer.close()

    def collect(self) -> tuple[Scored, Steps]:
        """Returns this replica's groups of a rollout. Every rank of the job calls it.

        Raises:
            DataError: on every rank, for a row that cannot be read or labelled; if the rewards of a
                step failed (`check_rewards`); or if nothing at all is left to train on.
        """
        rounds: list[Scored] = []
        kept, most = 0, self.rl.max_generation_rounds if self.rl.filter_groups else 1
        while kept < self.plan.prompts and len(rounds) < most:
            scored = self._round()
            rounds.append(scored)
            kept += self._over_replicas(len(scored.groups))
        found = join(rounds)
        if not kept:
            why = found.skipped or ["all rewards of every group were equal; see reward_funcs"]
            raise DataError(
                f"0 groups to train on after {found.rounds} rounds of {self.plan.prompts} prompts: "
                f"{broadcast_from_reader(self.engine.groups, lambda: why[0])}"
            )
        mine = [group.number for group in found.groups]
        chosen, steps = assign_steps(
            mine, self._over_all(mine), self.plan.prompts, self.plan.prompts_per_step
        )
        found = found.only(chosen)
        self._check(found, steps.of_group, steps.count)
        return found, steps

    def _check(self, scored: Scored, of_group: Sequence[int], steps: int) -> None:
        # The router's reward applies to every completion, and so do teachers.
        others = self.rl.earl.router_reward_weight > 0 or bool(teacher_folders(self.rl))
        most = self.rl.max_reward_failures
        check_rewards(self.engine, scored, self.scorer.weights, of_group, steps, most, others)

    def _round(self) -> Scored:
        rollout = draw_rollout(
            self.engine, self.tokenizer, self.loader, record_routes=self.record_routes
        )
        scored = self.scorer.score(rollout)
        if not self.rl.filter_groups:
            return scored
        # Groups that are dropped reach no step.
        self._check(scored, [0] * len(scored.groups), 1)
        return scored.only(informative(scored, self.scorer.weights))

    def _over_replicas(self, count: int) -> int:
        """Sums a replica's count over replicas."""
        total = torch.tensor(count if self.engine.groups.is_reader else 0)
        dist.all_reduce(total, group=self.engine.groups.world)
        return int(total)

    def _over_all(self, numbers: list[int]) -> list[int]:
        """Returns the numbers of all replicas, none below 0."""
        mine = numbers if self.engine.groups.is_reader else []
        (most,) = largest([len(mine)])
        padded = [*mine, *[-1] * (most - len(mine))]
        return [int(number) for row in everyone(padded) for number in row if number >= 0]


def assign_steps(
    mine: Sequence[int], all_numbers: Sequence[int], prompts: int, prompts_per_step: int
) -> tuple[list[int], Steps]:
    """Chooses the groups that are trained on, the first in the data's order, and the step of each.
    The step follows from a group's place in that order, so steps hold the same completions under
    any layout.

    Args:
        mine: numbers of this replica's groups.
        all_numbers: numbers of the groups of all replicas, in any order.
        prompts: groups of a rollout, at most; prompts_per_step: of one step.
    Returns:
        the places in `mine` of the groups that are chosen, and their steps.
    """
    place = {number: n for n, number in enumerate(sorted(all_numbers)[:prompts])}
    chosen = [p for p, number in enumerate(mine) if number in place]
    steps = tuple(place[mine[p]] // prompts_per_step for p in chosen)
    return chosen, Steps(steps, (len(place) - 1) // prompts_per_step + 1)

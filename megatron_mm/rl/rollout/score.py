"""Scores a rollout: the rewards of every completion, and its labelled spans."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_mm.data.files.keys import LOOKS
from megatron_mm.data.loading.reader import Prompt
from megatron_mm.data.place_names import without_places
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.earl.alignment import Alignment
from megatron_mm.earl.spans import Span
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import broadcast_from_reader
from megatron_mm.generation.gather import gather_layers
from megatron_mm.generation.lanes import Completion
from megatron_mm.generation.looked import Looked, gather_looked
from megatron_mm.rl.advantages import keep_groups, weighted
from megatron_mm.rl.rewards.runner import RewardRunner
from megatron_mm.rl.rollout.columns import Columns
from megatron_mm.rl.rollout.draw import Group, Rollout, moe_layers
from megatron_mm.rl.settings import RLConfig

NOT_COLUMNS = ("messages", "images")  # of a row; a reward gets the messages as its prompt
LOOKED = "looked"  # the column that says where a completion looked


@dataclass(frozen=True)
class Scored:
    """A rollout with its rewards and labels, the same on every rank of the replica.

    Shapes: P groups, G completions of each, C reward functions, N = P x G.

    Attributes:
        names: of the reward functions.
        rewards_PGC: fp32; NaN where a reward does not apply or failed.
        failed_PGC: bool.
        spans: [P][G], the labelled spans of each completion.
        rounds: of drawing.
        generated: completions that were drawn, those that are not trained on too.
        missing: spans whose skill has no cluster.
        skipped: the rows that could not be read, with the reason.
        failures: the reasons why rewards failed or were lost, with the row.
        seconds: by phase.
        logged: numbers that reward functions logged, by the metric's name; a metric is their mean.
    """

    groups: tuple[Group, ...]
    names: tuple[str, ...]
    rewards_PGC: torch.Tensor
    failed_PGC: torch.Tensor
    spans: tuple[tuple[list[Span], ...], ...]
    rounds: int
    generated: int
    missing: int
    skipped: tuple[str, ...]
    failures: tuple[str, ...]
    seconds: dict[str, float]
    logged: tuple[tuple[str, float], ...] = ()

    @property
    def completions(self) -> list[Completion]:
        """All N completions, group by group."""
        return [completion for group in self.groups for completion in group.completions]

    @property
    def spans_N(self) -> list[list[Span]]:
        """The labelled spans of all N completions."""
        return [marks for group in self.spans for marks in group]

    def only(self, chosen: Sequence[int]) -> Scored:
        """Returns the same with some groups alone, by their places here; the counts stay."""
        return replace(
            self,
            groups=tuple(self.groups[p] for p in chosen),
            rewards_PGC=self.rewards_PGC[list(chosen)],
            failed_PGC=self.failed_PGC[list(chosen)],
            spans=tuple(self.spans[p] for p in chosen),
        )


def join(rounds: Sequence[Scored]) -> Scored:
    """Joins several rounds into one value."""

    def chained(name: str) -> tuple:
        return tuple(value for one in rounds for value in getattr(one, name))

    return Scored(
        groups=chained("groups"),
        names=rounds[0].names,
        rewards_PGC=torch.cat([one.rewards_PGC for one in rounds]),
        failed_PGC=torch.cat([one.failed_PGC for one in rounds]),
        spans=chained("spans"),
        rounds=sum(one.rounds for one in rounds),
        generated=sum(one.generated for one in rounds),
        missing=sum(one.missing for one in rounds),
        skipped=chained("skipped"),
        failures=chained("failures"),
        seconds={name: sum(one.seconds[name] for one in rounds) for name in rounds[0].seconds},
        logged=chained("logged"),
    )


def totals(scored: Scored, weights: Sequence[float]) -> torch.Tensor:
    """Returns the weighted sum of the functions' rewards, [P, G]; NaN where a completion is left
    out (`weighted`)."""
    return weighted(scored.rewards_PGC, scored.failed_PGC, torch.tensor(weights))[1]


def informative(scored: Scored, weights: Sequence[float]) -> list[int]:
    """Returns the places of the groups whose completions differ in their reward, those that DAPO's
    dynamic sampling keeps (`keep_groups`). A completion that is left out makes no difference."""
    return keep_groups(totals(scored, weights)).nonzero().flatten().tolist()


class Scorer:
    """The reward functions of a run, in worker processes of the replicas' readers. Close it.

    Args:
        columns: that rewards are called with.
    Attributes:
        names: of the reward functions; weights: their factors.
        wants_routes: whether any of them reads `routed_experts`.
    """

    def __init__(
        self,
        rl: RLConfig,
        engine: Engine,
        tokenizer: Tokenizer,
        alignment: Alignment | None,
        columns: Columns,
    ):
        self._engine, self._tokenizer, self._alignment = engine, tokenizer, alignment
        self._num_generations, self._columns = rl.num_generations, columns
        self.weights = rl.reward_weights or [1.0] * len(rl.reward_funcs)
        self._runner: RewardRunner | None = None

        def start() -> tuple[list[str], bool]:
            self._runner = RewardRunner(
                rl.reward_funcs,
                rl.reward_num_workers,
                rl.reward_timeout,
                rl.reward_batch_size,
                rl.reward_lost_value,
                rl.reward_memory,
            )
            return self._runner.names, self._runner.wants_routes

        self.names, self.wants_routes = broadcast_from_reader(engine.groups, start)

    def close(self) -> None:
        """Ends the workers."""
        if self._runner is not None:
            self._runner.close()

    def score(self, rollout: Rollout) -> Scored:
        """Scores this replica's completions. Every rank of the job calls it.

        Raises:
            DataError: on every rank, for a row that cannot be labelled.
        """
        begin = time.perf_counter()
        completions = [c for group in rollout.groups for c in group.completions]
        routes = None
        if self.wants_routes:
            layers = moe_layers(self._engine)
            routes = gather_layers(self._engine.groups, completions, layers, lambda c: c.routes_GLk)
        looked = gather_looked(self._engine, completions)
        mine: set[str] = set()
        if self._engine.groups.is_reader:  # it has the prompts
            mine = {key for group in rollout.groups for key in group.asked.row}
        known = self._columns.with_round(self._engine.groups, mine)
        keys = [key for key in known if key not in NOT_COLUMNS]
        verdict = broadcast_from_reader(
            self._engine.groups,
            lambda: self._judge(rollout.groups, completions, keys, routes, looked),
        )
        starts = range(0, len(completions), self._num_generations)
        shape = (len(rollout.groups), self._num_generations, len(self.names))
        return Scored(
            groups=rollout.groups,
            names=tuple(self.names),
            rewards_PGC=verdict.rewards_NC.view(shape),
            failed_PGC=verdict.failed_NC.view(shape),
            spans=tuple(tuple(verdict.spans_N[i : i + self._num_generations]) for i in starts),
            rounds=1,
            generated=len(completions),
            missing=verdict.missing,
            skipped=rollout.skipped,
            failures=verdict.failures,
            seconds={"generate": rollout.seconds, "reward": time.perf_counter() - begin},
            logged=verdict.logged,
        )

    def _judge(
        self,
        groups: Sequence[Group],
        completions: Sequence[Completion],
        keys: Sequence[str],
        routes: list[torch.Tensor] | None,
        looked: list[Looked] | None,
    ) -> _Verdict:
        """Calls the reward functions and the labeller; on the reader, which has the prompts."""
        asked = [group.asked for group in groups for _ in group.completions]
        ids = [completion.tokens_G.tolist() for completion in completions]
        said = [without_places(self._tokenizer.decode_answer(i)) for i in ids]
        columns: dict[str, list[Any]] = {key: [p.row.get(key) for p in asked] for key in keys}
        if LOOKS in columns:  # a reward is about the completion, not about earlier answers
            columns[LOOKS] = [
                boxes and boxes[len(prompt.sample.queries) :]
                for boxes, prompt in zip(columns[LOOKS], asked, strict=True)
            ]
        if looked is not None:
            columns[LOOKED] = looked
        messages = [_messages(prompt) for prompt in asked]
        assert self._runner is not None  # the reader has started it
        rewards = self._runner.score(messages, said, ids, columns, routes)
        # Those that leave a completion out come first: the run may stop with the first of them.
        weight = dict(zip(self.names, self.weights, strict=True))
        lost = {n: dict(zip(self.names, row, strict=True)) for n, row in enumerate(rewards.lost)}
        counted = sorted(
            rewards.failures, key=lambda f: (lost[f.sample][f.name], weight[f.name] == 0)
        )
        failures = [f"{asked[f.sample].where}: {f.name}: {f.reason}" for f in counted]
        labelled: list[tuple[list[Span], int]] = [([], 0)] * len(completions)
        if self._alignment is not None:
            labelled = [
                self._alignment.spans(prompt, completion, self._tokenizer)
                for prompt, completion in zip(asked, completions, strict=True)
            ]
        return _Verdict(
            torch.tensor(rewards.values, dtype=torch.float32),
            torch.tensor(rewards.failed, dtype=torch.bool),
            tuple(failures),
            [spans for spans, _ in labelled],
            sum(missing for _, missing in labelled),
            tuple(rewards.logged),
        )


@dataclass(frozen=True)
class _Verdict:
    """The reader's findings, as they are sent to the other ranks of its replica; see `Scored`."""

    rewards_NC: torch.Tensor
    failed_NC: torch.Tensor
    failures: tuple[str, ...]
    spans_N: list[list[Span]]
    missing: int
    logged: tuple[tuple[str, float], ...]


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    messages = prompt.row["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages

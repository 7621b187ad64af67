"""From rows to groups: prompts, their completions, the rewards of each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_mm.config import RunConfig
from megatron_mm.data.loading.reader import Prompt
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.earl.alignment import Alignment, Span
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import broadcast_from_reader
from megatron_mm.errors import DataError
from megatron_mm.generation.generate import Prompts, generate
from megatron_mm.generation.lanes import Completion
from megatron_mm.generation.sampling import Sampling
from megatron_mm.rl.advantages import keep_groups
from megatron_mm.rl.rewards.runner import RewardRunner
from megatron_mm.rl.rollout.prompts import PromptLoader
from megatron_mm.rl.settings import RLConfig, resolve_algorithm, rollout_plan

NOT_COLUMNS = ("messages", "images")  # of a row; a reward gets the first as its prompt


@dataclass
class Group:
    """A prompt and its completions, on every rank of the replica that generated them.

    Attributes:
        number: of the row in the data's order; unlike any other's.
        rewards_GC: NaN where a reward does not apply or failed.
        prompt: on the reader only.
    """

    number: int
    completions: list[Completion]
    rewards_GC: torch.Tensor
    failed_GC: torch.Tensor
    spans: list[list[Span]]
    prompt: Prompt | None


@dataclass
class Collected:
    """
    Attributes:
        groups: those of this replica that are trained on.
        place: number of a group -> its place among those of all replicas, in the data's order.
        generated: completions that were generated, those not trained on too.
        missing: spans whose skill has no cluster.
        failures: why rewards failed, some of them.
    """

    groups: list[Group] = field(default_factory=list)
    place: dict[int, int] = field(default_factory=dict)
    rounds: int = 0
    generated: int = 0
    missing: int = 0
    skipped: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class Collector:
    """
    Attributes:
        names: of the rewards.
    """

    def __init__(
        self,
        run: RunConfig,
        engine: Engine,
        tokenizer: Tokenizer,
        loader: PromptLoader,
        alignment: Alignment | None,
    ):
        self.engine, self.tokenizer, self.loader = engine, tokenizer, loader
        self.alignment = alignment
        self.rl, self.plan = resolve_algorithm(run.section(RLConfig)), rollout_plan(run)
        self.weights = self.rl.reward_weights or [1.0] * len(self.rl.reward_funcs)
        rl = self.rl
        self.sampling = Sampling(
            (tokenizer.message_end_id,),
            rl.max_completion_length,
            rl.temperature,
            rl.top_p,
            rl.top_k,
            run.training.seed,
            rl.router_temperature,
        )
        self._runner: RewardRunner | None = None

        def start_rewards() -> tuple[list[str], bool]:
            self._runner = RewardRunner(
                rl.reward_funcs, rl.reward_num_workers, rl.reward_timeout, rl.reward_batch_size
            )
            return self._runner.names, self._runner.wants_routes

        self.names, self._rewards_want_routes = broadcast_from_reader(engine.groups, start_rewards)
        mapped = alignment is not None and alignment.found is not None
        self.record_routes = mapped or self._rewards_want_routes or rl.routing_replay == "R3"

    def close(self) -> None:
        """End the reward workers."""
        if self._runner is not None:
            self._runner.close()

    def collect(self) -> Collected:
        """The groups of a rollout. Every rank of the job calls it.

        Raises:
            DataError: on every rank, for a row that cannot be read or labelled; or if nothing at
                all is left to train on.
        """
        found, kept = Collected(), 0
        while kept < self.plan.prompts and found.rounds < self._max_rounds:
            self._round(found)
            kept = self._everywhere(len(found.groups))
        if not kept:
            why = found.skipped or ["all rewards of every group were equal; see reward_funcs"]
            raise DataError(
                f"0 groups to train on after {found.rounds} rounds of {self.plan.prompts} prompts: "
                f"{broadcast_from_reader(self.engine.groups, lambda: why[0])}"
            )
        self._place(found)
        return found

    @property
    def _max_rounds(self) -> int:
        return self.rl.max_generation_rounds if self.rl.filter_groups else 1

    def _round(self, found: Collected) -> None:
        groups, clock = self.engine.groups, time.perf_counter
        begin = clock()
        numbers = self.loader.numbers(self.plan.prompts)
        prompts: list[Prompt] = []

        def draw() -> tuple[list[int], list[str]]:
            drawn = self.loader.read(numbers)
            prompts.extend(drawn.prompts)
            return drawn.kept, drawn.skipped

        kept, skipped = broadcast_from_reader(groups, draw)
        found.skipped += skipped
        completions = generate(
            self.engine,
            Prompts(lambda index: prompts[index].sample, kept),
            self.sampling,
            num_generations=self.rl.num_generations,
            max_num_seqs=self.rl.max_num_seqs,
            pad_id=self.tokenizer.pad_id,
            record_routes=self.record_routes,
        )
        generated = clock()
        routes = self._all_routes(completions) if self._rewards_want_routes else None
        values, failed, failures, spans, missing = broadcast_from_reader(
            groups, lambda: self._judge(prompts, completions, routes)
        )
        found.rounds += 1
        found.generated += sum(map(len, completions))
        found.missing += missing
        found.failures += failures
        for name, seconds in (("generate", generated - begin), ("reward", clock() - generated)):
            found.seconds[name] = found.seconds.get(name, 0.0) + seconds
        for index, number in enumerate(kept):
            group = Group(
                number,
                completions[index],
                values[index],
                failed[index],
                spans[index],
                prompts[index] if groups.is_reader else None,
            )
            if not self.rl.filter_groups or self._differs(group):
                found.groups.append(group)

    def _differs(self, group: Group) -> bool:
        usable_GC = torch.where(group.failed_GC, torch.nan, group.rewards_GC)
        total_G = (usable_GC * torch.tensor(self.weights)).nansum(1)
        total_G[usable_GC.isnan().all(1)] = torch.nan
        return bool(keep_groups(total_G.unsqueeze(0))[0])

    def _judge(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        routes: list[torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, list[str], list[list[list[Span]]], int]:
        """On the reader: rewards [P, G, C], which failed, why, the spans, missing clusters."""
        asked = [prompt for prompt, group in zip(prompts, completions, strict=True) for _ in group]
        flat = [completion for group in completions for completion in group]
        ids = [completion.tokens_G.tolist() for completion in flat]
        said = [
            self.tokenizer.decode(i[:-1] if c.finished else i)
            for i, c in zip(ids, flat, strict=True)
        ]
        keys = sorted({key for prompt in prompts for key in prompt.row} - {*NOT_COLUMNS})
        columns: dict[str, list[Any]] = {key: [p.row.get(key) for p in asked] for key in keys}
        messages = [_messages(prompt) for prompt in asked]
        rewards = self._runner.score(messages, said, ids, columns, routes)
        shape = (len(prompts), self.rl.num_generations, len(self.names))
        values = torch.tensor(rewards.values, dtype=torch.float32).view(shape)
        failed = torch.tensor(rewards.failed, dtype=torch.bool).view(shape)
        failures = [f"{asked[f.sample].where}: {f.name}: {f.reason}" for f in rewards.failures]
        spans, missing = [], 0
        for prompt, group in zip(prompts, completions, strict=True):
            spans.append([])
            for completion in group:
                marks, without = [], 0
                if self.alignment is not None:
                    marks, without = self.alignment.spans(prompt, completion, self.tokenizer)
                spans[-1].append(marks)
                missing += without
        return values, failed, failures, spans, missing

    def _all_routes(self, completions: Sequence[Sequence[Completion]]) -> list[torch.Tensor]:
        """On the reader: int16 [G, all layers, k] of each completion, from all stages."""
        groups = self.engine.groups
        mine = None
        if groups.pg.tp_cp.rank() == 0:
            flat = [c for group in completions for c in group]
            mine = self.layers, [c.routes_SLk[-len(c.tokens_G) :] for c in flat if self.layers]
        parts: list = [None] * groups.replica.size()
        kept = parts if groups.is_reader else None
        dist.gather_object(mine, kept, group=groups.replica, group_dst=0)
        if not groups.is_reader:
            return []
        parts = [part for part in parts if part and part[0]]
        order = torch.tensor([index for layers, _ in parts for index in layers]).argsort()
        return [
            torch.cat(of_one, 1)[:, order]
            for of_one in zip(*(routes for _, routes in parts), strict=True)
        ]

    @property
    def layers(self) -> list[int]:
        """Moe indices of this rank's layers of experts, as routes have them."""
        return sorted(index for chunk in self.engine.chunks for index in chunk.moe_layers)

    def _everywhere(self, count: int) -> int:
        """A replica's count, summed over replicas."""
        total = torch.tensor(count if self.engine.groups.is_reader else 0)
        dist.all_reduce(total, group=self.engine.groups.world)
        return int(total)

    def _place(self, found: Collected) -> None:
        """Of all groups that were kept, the first in the data's order are trained on."""
        groups = self.engine.groups
        parts: list = [None] * groups.world.size()
        mine = [group.number for group in found.groups] if groups.is_reader else []
        dist.all_gather_object(parts, mine, group=groups.world)
        numbers = sorted(number for part in parts for number in part)[: self.plan.prompts]
        found.place = {number: place for place, number in enumerate(numbers)}
        found.groups = [group for group in found.groups if group.number in found.place]


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    messages = prompt.row["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages

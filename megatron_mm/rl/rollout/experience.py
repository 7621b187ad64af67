"""What the steps of reinforcement learning are made of: a rollout, cut into microbatches.

A rollout serves several optimizer steps. Which step a group belongs to follows from its place in
the data's order, so steps hold the same completions under any layout.

Shapes: P groups of this replica, G completions of each, C rewards, N = P x G.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from megatron_mm.cli import EVERY_RANK
from megatron_mm.config import RunConfig, resolve_algorithm, rollout_plan, token_multiple
from megatron_mm.data.tiles import image_settings
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.earl.alignment import Alignment
from megatron_mm.earl.hacking import HackingWatch
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import broadcast_batches, raise_together
from megatron_mm.errors import RLError
from megatron_mm.model.routing import Routes, whole_routes
from megatron_mm.rl.credit import Credit
from megatron_mm.rl.objective import ExpertAlignedObjective, PolicyObjective, trainer_logprobs
from megatron_mm.rl.policy_batch import PolicyBatch, answered, policy_batch, token_bins
from megatron_mm.rl.policy_losses import truncated_importance_weights
from megatron_mm.rl.reference import Reference
from megatron_mm.rl.rollout.collect import Collected, Collector, Group
from megatron_mm.rl.rollout.metrics import completions_table, rollout_metrics
from megatron_mm.rl.rollout.prompts import PromptLoader

logger = logging.getLogger(__name__)


class Experience:
    """
    Attributes:
        objective: what the steps optimise.
        metrics: of the rollout that the last step began; else empty.
        table: of that rollout, some completions with their rewards; on the readers.
    """

    def __init__(self, run: RunConfig, engine: Engine, tokenizer: Tokenizer, loader: PromptLoader):
        self.run, self.engine, self.tokenizer, self.loader = run, engine, tokenizer, loader
        self.rl, self.plan = resolve_algorithm(run.rl), rollout_plan(run)
        error = self.alignment = None
        try:
            self.alignment = Alignment.of(run)
        except RLError as problem:
            error = str(problem)
        raise_together(engine.groups, error)
        self.objective: PolicyObjective = PolicyObjective(self.rl)
        if self.rl.router_loss_coeff:
            self.objective = ExpertAlignedObjective(self.rl, self.alignment.used.membership())
        self.collector = Collector(run, engine, tokenizer, loader, self.alignment)
        self.credit = Credit(self.rl, engine.groups, self.collector, self.alignment)
        self.reference = Reference(engine, self.rl.ref_load) if self.rl.ref_load else None
        self._ready: deque[list[PolicyBatch]] = deque()
        self.watch = HackingWatch()
        self.metrics: dict[str, float] = {}
        self.table: list[dict[str, Any]] = []

    @property
    def between(self) -> bool:
        """Whether the rollout is used up."""
        return not self._ready

    def close(self) -> None:
        """End the reward workers."""
        self.collector.close()

    def next_step(self, stop: bool) -> tuple[list[PolicyBatch], bool]:
        """The microbatches of the next step, and whether any rank wants to stop: then there are
        none. A rollout that was begun is trained on to its end.

        Raises:
            DataError: on every rank; the position in the data is as it was.
        """
        self.metrics, self.table = {}, []
        if not self._ready:
            if raise_together(self.engine.groups, None, stop):
                return [], True
            position = self.loader.state_dict()
            try:
                self._ready.extend(self._rollout())
            except BaseException:
                self.loader.load_state_dict(position)
                raise
        return self._ready.popleft(), False

    def _rollout(self) -> list[list[PolicyBatch]]:
        begin = time.perf_counter()
        found = self.collector.collect()
        self._tell(found)
        order = [found.place[group.number] for group in found.groups]
        last = max(found.place.values())
        steps = last // self.plan.prompts_per_step + 1
        mine = [place // self.plan.prompts_per_step for place in order]
        made = [
            self._microbatches(found.groups, [p for p, of in enumerate(mine) if of == step])
            for step in range(steps)
        ]
        logprobs_begin = time.perf_counter()
        self._logprobs(list(chain.from_iterable(made)), found)
        found.seconds["logprobs"] = time.perf_counter() - logprobs_begin
        rollout = self.credit.assign(found, made)
        found.seconds["rollout"] = time.perf_counter() - begin
        language = self.run.model.language
        self.metrics = rollout_metrics(
            rollout,
            self.engine.groups,
            self.collector.weights,
            self.alignment,
            self.collector.layers,
            (language.num_experts, language.vocab_size),
        )
        self._watch()
        if self.engine.groups.is_reader:
            self.table = completions_table(rollout, self.tokenizer, rollout.names)
        return made * self.rl.num_iterations

    def _tell(self, found: Collected, most: int = 3) -> None:
        """Say why rows were skipped and rewards failed; the metrics have the numbers."""
        for what, reasons in (("left out", found.skipped), ("rewards failed", found.failures)):
            if reasons and self.engine.groups.is_reader:
                logger.info("%s: %s", what, "; ".join(reasons[:most]), extra=EVERY_RANK)

    def _watch(self) -> None:
        hit_rate, task = (self.metrics.get(k) for k in ("rollout/moe/hit_rate", "reward/task"))
        if hit_rate is None or task is None:
            return
        warning = self.watch.update(hit_rate, task)
        self.metrics["rollout/moe/reward_hacking"] = float(warning is not None)
        if warning:
            logger.warning("%s", warning)

    # ---- microbatches ----

    def _microbatches(self, groups: Sequence[Group], chosen: Sequence[int]) -> list[PolicyBatch]:
        """The completions of some groups, in as many microbatches on every replica."""
        size, engine = self.rl.num_generations, self.engine
        members = [p * size + g for p in chosen for g in range(size)]
        capacity = self.run.training.micro_batch_size * self.run.data.seq_length
        samples, bins = [], []
        if engine.groups.is_reader:
            samples = [
                answered(groups[n // size].prompt.sample, self._completion(groups, n).tokens_G)
                for n in members
            ]
            bins = token_bins([len(s.tokens_T) for s in samples], capacity)
        count = torch.tensor(max(1, len(bins)))
        dist.all_reduce(count, op=dist.ReduceOp.MAX, group=engine.groups.world)
        stages = engine.groups.pg.pp.size() if len(engine.chunks) > 1 else 1
        total = -(-int(count) // stages) * stages  # the interleaved schedule takes whole rounds
        batches = []
        if engine.groups.is_reader:
            bins += [[] for _ in range(total - len(bins))]
            batches = [
                policy_batch(
                    [samples[i] for i in chosen],
                    [members[i] for i in chosen],
                    settings=image_settings(self.run),
                    pad_id=self.tokenizer.pad_id,
                    pad_multiple=token_multiple(self.run),
                )
                for chosen in bins
            ]
        batches = broadcast_batches(engine.groups, batches)
        if self.rl.routing_replay == "R3":
            for batch in batches:
                batch.routes = self._recorded(groups, batch)
        return batches

    def _completion(self, groups: Sequence[Group], member: int):
        return groups[member // self.rl.num_generations].completions[
            member % self.rl.num_generations
        ]

    def _recorded(self, groups: Sequence[Group], batch: PolicyBatch) -> Routes:
        """The rollout's routes at the positions of a microbatch; -1 where there are none."""
        layers, k = self.collector.layers, self.run.model.language.moe_router_topk
        whole = torch.full((len(batch.tokens_T), len(layers), k), -1, dtype=torch.int16)
        for place, member in enumerate(batch.members):
            routes = self._completion(groups, member).routes_SLk
            if routes is not None:
                start = int(batch.cu_seqlens[place])
                whole[start : start + len(routes)] = routes
        return dict(zip(layers, whole.unbind(1), strict=True))

    # ---- log-probabilities ----

    def _logprobs(self, batches: list[PolicyBatch], found: Collected) -> None:
        """Fill in the rollout's log-probabilities and, where they are needed, the trainer's and
        the reference's."""
        rl = self.rl
        for batch in batches:
            batch.rollout_logprobs_T = batch.spread(
                [self._completion(found.groups, n).logprobs_G for n in batch.members]
            )
        replays = rl.routing_replay == "R2"
        # With one step on these weights, what it computes is what it would be compared with.
        if self.plan.steps > 1 or rl.rollout_is or rl.use_kl_in_reward or replays:
            record: list[Routes] | None = [{} for _ in batches] if replays else None
            old = trainer_logprobs(self.engine, batches, rl.temperature, record)
            for index, batch in enumerate(batches):
                batch.old_logprobs_T = old[index]
                if record is not None:
                    whole = whole_routes(record[index], self.engine.groups.pg)
                    batch.routes = {layer: routes.cpu() for layer, routes in whole.items()}
                if rl.rollout_is:
                    batch.rollout_weights_T = truncated_importance_weights(
                        batch.old_logprobs_T,
                        batch.rollout_logprobs_T,
                        batch.completion_T,
                        len(batch.members),
                        rl.rollout_is,
                        rl.rollout_is_threshold,
                    )
        if self.reference is not None:
            # The reference chooses its own experts, whatever the policy's steps replay; but where
            # they are drawn, those are given: equal weights must not differ by the draw.
            drawn = rl.router_temperature > 0
            free = batches if drawn else [replace(batch, routes=None) for batch in batches]
            with self.reference.in_place():
                theirs = trainer_logprobs(self.engine, free, rl.temperature)
            for batch, logprobs in zip(batches, theirs, strict=True):
                batch.ref_logprobs_T = logprobs

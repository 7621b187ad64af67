"""The steps of reinforcement learning: a rollout as policy batches.

    draw_rollout -> Rollout -> Scorer -> Scored -> credit -> Credited -> policy_batches
    `------------- Collector.collect ---------'        (with the log-probabilities of its tokens)

A rollout serves several optimizer steps. Every value of the chain is complete when it is made, and
none is changed afterwards.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch

from megatron_mm.cli import EVERY_RANK
from megatron_mm.config import RunConfig
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.earl.alignment import Alignment, count_hits
from megatron_mm.earl.hacking import HackingWatch
from megatron_mm.earl.metrics import Pairs
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import (
    broadcast_from_reader,
    raise_together,
    sum_over_readers,
    values_of_readers,
)
from megatron_mm.engine.totals import KnownTotals
from megatron_mm.errors import ConfigError, RLError
from megatron_mm.rl.completion_batch import CompletionBatch, pack_step
from megatron_mm.rl.credit import Credited, completion_kl, credit, teacher_gaps, teacher_sums
from megatron_mm.rl.logprobs import Logprobs, measure_logprobs
from megatron_mm.rl.objective import ExpertAlignedObjective, PolicyObjective
from megatron_mm.rl.policy_batch import PolicyBatch, policy_batches
from megatron_mm.rl.reference import follow, open_sets
from megatron_mm.rl.rollout.collect import Collector
from megatron_mm.rl.rollout.draw import moe_layers
from megatron_mm.rl.rollout.metrics import completions_table, rollout_metrics
from megatron_mm.rl.rollout.prompts import PromptSource
from megatron_mm.rl.rollout.score import Scored
from megatron_mm.rl.settings import resolved, rollout_plan
from megatron_mm.rl.weightings import Factors, Judged, Weighting, weighting_of

logger = logging.getLogger(__name__)


class Experience:
    """The source of a run's steps; a `train.source.StepSource`. Close it.

    Attributes:
        objective: the objective of the steps.
        metrics: of the rollout that the last step began; else empty.
        table: of that rollout, some completions with their rewards; on the readers.
    """

    def __init__(self, run: RunConfig, engine: Engine, tokenizer: Tokenizer, loader: PromptSource):
        self.run, self.engine, self.tokenizer, self.loader = run, engine, tokenizer, loader
        self.rl, self.plan = resolved(run), rollout_plan(run)
        error = self.alignment = None
        self._weighting: Weighting | None = None
        try:
            self.alignment = Alignment.of(run)
            if self.rl.advantage_weighting:
                self._weighting = weighting_of(self.rl.advantage_weighting)
        except (ConfigError, RLError) as problem:
            error = str(problem)
        raise_together(engine.groups, error)
        self.maps = None if self.alignment is None else self.alignment.maps
        # The experts that the routers learn; positions without a skill weigh nothing.
        self.member_SLE: torch.Tensor | None = None
        if self.rl.earl.router_loss_coeff:
            assert self.maps is not None  # the coefficient is rejected without a skill map
            self.member_SLE = self.maps.used.membership()
        kind = PolicyObjective if self.member_SLE is None else ExpertAlignedObjective
        self.objective: PolicyObjective = kind(self.rl)
        self.collector = Collector(run, engine, tokenizer, loader, self.alignment)
        self.sets = open_sets(engine)
        self._sum_over_readers = partial(sum_over_readers, engine.groups)
        self._ready: deque[list[PolicyBatch]] = deque()
        self.watch = HackingWatch()
        self.known = KnownTotals()
        self.metrics: dict[str, float] = {}
        self.table: list[dict[str, Any]] = []

    @property
    def between(self) -> bool:
        """Whether the rollout is used up."""
        return not self._ready

    def close(self) -> None:
        """Ends the reward workers."""
        self.collector.close()

    def stepped(self, metrics: Mapping[str, float]) -> None:
        """Moves the reference model, if it is due."""
        follow(self.sets, self.engine)

    def next_step(self, stop: bool) -> tuple[list[PolicyBatch], bool]:
        """Returns the microbatches of the next step, and whether any rank wants to stop: then there
        are none. A rollout that was begun is trained on to its end.

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
        """Makes the microbatches of every step of a rollout; sets `metrics` and `table`."""
        begin, engine, rl = time.perf_counter(), self.engine, self.rl
        scored, steps = self.collector.collect()
        self._warn_of_failures(scored)
        packed = [
            pack_step(
                engine,
                self.tokenizer,
                scored.groups,
                [p for p, of in enumerate(steps.of_group) if of == step],
            )
            for step in range(steps.count)
        ]
        batches = list(chain.from_iterable(packed))
        measured = time.perf_counter()
        logprobs = measure_logprobs(
            engine,
            batches,
            scored.completions,
            rl,
            steps=self.plan.steps,
            sets=self.sets,
        )
        seconds = scored.seconds | {"logprobs": time.perf_counter() - measured}
        credited = self._credit(scored, batches, logprobs)
        known = iter(logprobs)
        made = [
            policy_batches(
                step,
                [next(known) for _ in step],
                credited,
                rl,
                self.member_SLE,
                self._sum_over_readers,
                partial(values_of_readers, engine.groups),
            )
            for step in packed
        ]
        taught = teacher_sums(batches, logprobs) if rl.teacher_load else {}
        self._report(credited, seconds | {"rollout": time.perf_counter() - begin}, taught)
        return made * rl.num_iterations

    def _credit(
        self,
        scored: Scored,
        batches: Sequence[CompletionBatch],
        logprobs: Sequence[Logprobs],
    ) -> Credited:
        rl, hits, kl, taught = self.rl, None, None, None
        if self.maps is not None:
            layers = moe_layers(self.engine)
            hits = count_hits(
                self.maps, scored.completions, scored.spans_N, layers, self.engine.groups
            )
        if rl.use_kl_in_reward:
            kl = completion_kl(batches, logprobs, rl.kl_estimator)
        if rl.teacher_load:
            taught = teacher_gaps(batches, logprobs)
        weights = self.collector.scorer.weights
        weigh = None if self._weighting is None else self._weigh
        return credit(scored, weights, rl, hits, kl, self._sum_over_readers, taught, weigh)

    def _weigh(self, judged: Judged) -> Factors:
        """Weighs on the readers, so that what fails on one of them fails on every rank."""
        weighting = self._weighting
        assert weighting is not None  # else it is not called
        return broadcast_from_reader(self.engine.groups, lambda: weighting(judged))

    # ---- reporting ----

    def _report(self, credited: Credited, seconds: dict[str, float], taught: Pairs) -> None:
        language = self.run.model.language
        self.metrics = rollout_metrics(
            credited,
            self.engine.groups,
            self.maps,
            moe_layers(self.engine),
            (self.engine.config.num_layers, language.num_experts, language.vocab_size),
            seconds,
            taught,
            self.known,
        )
        more, warning = self.watch.observe(self.metrics)
        self.metrics |= more
        if warning:
            logger.warning("%s", warning)
        if self.engine.groups.is_reader:
            self.table = completions_table(credited, self.tokenizer)

    def _warn_of_failures(self, scored: Scored, most: int = 3) -> None:
        """Says why rows were skipped and rewards failed; the metrics have the numbers."""
        for what, reasons in (("left out", scored.skipped), ("rewards failed", scored.failures)):
            if reasons and self.engine.groups.is_reader:
                logger.info("%s: %s", what, "; ".join(reasons[:most]), extra=EVERY_RANK)

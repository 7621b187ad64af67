"""A run between its steps: its engine, its place in the data, its checkpoints. One step reads,
agrees, runs forward and backward, checks, updates.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from megatron_mm.checkpoint.saver import Saver
from megatron_mm.config import RunConfig, effective_pattern, routed_layers, token_multiple
from megatron_mm.convert.folder import NOTES
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.loading.loader import TrainLoader
from megatron_mm.data.tokenizer import Tokenizer, load_tokenizer
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import raise_together
from megatron_mm.engine.objective import Sums
from megatron_mm.errors import DataError, NonFiniteError
from megatron_mm.evaluation.evaluate import open_questions
from megatron_mm.model.routing import Terms
from megatron_mm.parallel.groups import Groups
from megatron_mm.rl.rollout.prompts import PromptLoader
from megatron_mm.train.router_norms import RouterNorms
from megatron_mm.train.source import SOURCES, StepSource
from megatron_mm.train.start import resumed, start


class Trainer:
    """A run: its engine, its data position, its log.

    Attributes:
        iteration: optimizer steps done.
    """

    def __init__(self, run: RunConfig, groups: Groups):
        run = resumed(run, groups)
        self.run, self.groups = run, groups
        self.tokenizer, loader = open_data(run, groups)
        torch.manual_seed(run.training.seed)
        self.engine = Engine.create(run, groups)
        if run.data.valid_data:  # a bad file is better known now than at the first evaluation
            open_questions(self.engine, self.tokenizer)
        self.source: StepSource = SOURCES[run.training.objective](
            run, self.engine, self.tokenizer, loader
        )
        self.router_norms = RouterNorms(self.engine)
        image_token = self.tokenizer.image_context_id
        begun = start(self.engine, loader, run.checkpoint, image_token)
        self.iteration, self.seconds = begun.iteration, begun.seconds
        self.notes = begun.notes | {"image_token_id": image_token}
        self.saver = Saver(
            self.engine,
            asynchronous=run.checkpoint.async_save,
            keep_last=run.checkpoint.keep_last_checkpoints,
        )
        self.stop_requested = False

    @property
    def loader(self) -> TrainLoader | PromptLoader:
        return self.source.loader

    @property
    def is_logger(self) -> bool:
        return dist.get_rank() == 0

    def request_stop(self, *_) -> None:
        """SIGTERM: save after the current step, then leave."""
        self.stop_requested = True

    def step(self) -> dict[str, float] | None:
        """One optimizer step; None if some rank was asked to stop before it.

        Raises:
            DataError: a row is bad (on every rank).
            NonFiniteError: before the update (on every rank).
        """
        begin = time.perf_counter()
        if self.saver.failed:
            self.request_stop()  # seen by all ranks at this step; saving once more says why
        batches, stopping = self.source.next_step(self.stop_requested)
        if stopping:
            return None
        terms: Terms = {}
        losses = self.engine.forward_backward(batches, self.source.objective, terms)
        metrics = self._totals(losses, terms, batches) | self.source.metrics
        norm = self.engine.gradient_norm()
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"gradient norm {norm} at iteration {self.iteration + 1}: nothing was updated; "
                f"the batch was {self._rows_of(batches)}"
            )
        metrics |= self.router_norms.measure()
        metrics["learning rate"] = self.engine.learning_rate()
        self.engine.update(norm)
        self.iteration += 1
        self.seconds += time.perf_counter() - begin
        return metrics | {
            "load_balancing_loss": self._load_balance(len(batches)),
            "grad norm": norm,
            "iteration time": time.perf_counter() - begin,
        }

    def _totals(
        self, losses: list[Sums], terms: Terms, batches: list[Microbatch]
    ) -> dict[str, float]:
        """Every sum over all microbatches and replicas, as ratios; the same on every rank.

        Raises:
            NonFiniteError: on every rank, if the loss of any microbatch anywhere is not finite.
            DataError: on every rank, if every row of the step was left out.
        """
        mine: dict[str, list[float]] = {}
        if self.groups.is_last_stage and self.groups.pg.tp.rank() == 0:
            for sums in losses:
                for name, pair in sums.items():
                    total = mine.setdefault(name, [0.0, 0.0])
                    total[0] += float(pair[0])
                    total[1] += float(pair[1])
        if terms:
            # Each rank's own layers and positions; the objective's sums have the denominator.
            mine.setdefault("router_loss", [0.0, 0.0])[0] += float(sum(terms.values()))
        if self.groups.is_reader:
            tokens = sum(batch.num_real_tokens for batch in batches)
            mine["tokens"] = [tokens, 0.0]
            mine["skipped samples"] = [sum(len(batch.skipped) for batch in batches), 0.0]
            mine["trained samples"] = [sum(len(batch.samples) for batch in batches), 0.0]
        if dist.get_rank() == 0:  # a reader; with packing only readers know
            mine["consumed samples"] = [self.loader.consumed_samples, 0.0]
        skipped = [why for batch in batches for why in batch.skipped][:3]
        notes: list = [None] * self.groups.world.size()
        note = (mine, self._problem(losses, batches), skipped if self.groups.is_reader else [])
        dist.all_gather_object(notes, note, group=self.groups.world)
        problems = [problem for _, problem, _ in notes if problem]
        if problems:
            raise NonFiniteError(problems[0])
        reasons = [reason for _, _, some in notes for reason in some]
        if reasons and self.is_logger:
            print("left out: " + "; ".join(reasons[:3]), file=sys.stderr)
        totals: dict[str, list[float]] = {}
        for part, _, _ in notes:
            for name, pair in part.items():
                total = totals.setdefault(name, [0.0, 0.0])
                total[0] += pair[0]
                total[1] += pair[1]
        if not totals.pop("trained samples")[0]:
            raise DataError(f"every row of a step was left out, the first because: {reasons[0]}")
        counts = ("tokens", "skipped samples", "consumed samples")
        return {n: a if n in counts else a / max(b, 1.0) for n, (a, b) in totals.items()}

    def _problem(self, losses: list[Sums], batches: list[Microbatch]) -> str | None:
        """What is wrong with this rank's losses; there are none before the last stage."""
        for sums, batch in zip(losses, batches, strict=False):
            for name, (total, _) in sums.items():
                if not math.isfinite(float(total)):
                    return (
                        f"{name} {float(total)} at iteration {self.iteration + 1}: nothing was "
                        f"updated; the microbatch was {', '.join(batch.samples)}"
                    )
        return None

    def _rows_of(self, batches: list[Microbatch], most: int = 8) -> str:
        """The first rows of the step over all replicas. Every rank calls it."""
        mine = [row for batch in batches for row in batch.samples if self.groups.is_reader]
        parts: list = [None] * self.groups.world.size()
        dist.all_gather_object(parts, mine, group=self.groups.world)
        rows = [row for part in parts for row in part]
        more = f" and {len(rows) - most} more" if len(rows) > most else ""
        return ", ".join(rows[:most]) + more

    def _load_balance(self, microbatches: int) -> float:
        """Mean over layers of experts and microbatches of the balancing loss before its coefficient
        (1 is perfect balance)."""
        name, layers = "load_balancing_loss", self.engine.config.num_layers
        tracker, losses = get_moe_metrics_tracker(), {}
        # A rank whose stages have no experts knows no group to sum over, and would report
        # less than the others (moe_logging.py:282).
        tracker.ensure_initialized(name, layers)
        tracker.metrics[name].reduce_group = self.groups.pg.tp_cp
        tracker.report(
            loss_scale=1.0 / microbatches,
            iteration=self.iteration,
            track_names=name,
            num_layers=max(1, len(routed_layers(effective_pattern(self.run.model)))),
            total_loss_dict=losses,
            pg_collection=self.groups.pg,
        )
        return float(losses[name])

    def time_is_up(self) -> bool:
        """Whether any rank has trained for `exit_duration_in_mins`. Every rank calls it."""
        limit = self.run.training.exit_duration_in_mins
        if limit is None or not self.source.between:
            return False
        return raise_together(self.groups, None, self.seconds >= 60 * limit)

    def save(self) -> float:
        """Save, or start to (`async_save`); for how many seconds training stood still."""
        folder = Path(self.run.checkpoint.save)
        extra = {"seconds": self.seconds, "data": self.loader.order, NOTES: self.notes}
        extra["objective"] = self.run.training.objective
        return self.saver.save(self.loader.state_dict(), folder, self.iteration, extra)


def open_data(run: RunConfig, groups: Groups) -> tuple[Tokenizer, TrainLoader | PromptLoader]:
    """On every rank, since files and positions are the same; errors are agreed on first."""
    tokenizer = loader = error = None
    ranks = {
        "data_parallel_rank": groups.pg.dp.rank(),
        "data_parallel_size": groups.pg.dp.size(),
    }
    try:
        if not run.data.tokenizer_model:
            raise DataError("tokenizer_model is not set: name a .model file or a folder")
        tokenizer = load_tokenizer(run.data.tokenizer_model)
        if run.training.objective == "grpo":
            loader = PromptLoader(run, tokenizer, **ranks)
        else:
            loader = TrainLoader(run, tokenizer, **ranks, pad_multiple=token_multiple(run))
    except DataError as problem:
        error = str(problem)
    raise_together(groups, error)
    return tokenizer, loader

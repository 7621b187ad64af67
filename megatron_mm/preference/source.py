"""The steps of training on preference pairs: rows as they are, and what the reference says of
them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mm.config import RunConfig
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import receive_step
from megatron_mm.preference.batch import PreferenceBatch, preference_batch
from megatron_mm.preference.loader import PairLoader
from megatron_mm.preference.objective import PreferenceObjective
from megatron_mm.preference.reference import open_reference
from megatron_mm.preference.settings import DPOConfig
from megatron_mm.rl.completion_batch import CompletionBatch
from megatron_mm.rl.logprobs import trainer_logprobs
from megatron_mm.rl.reference import REFERENCE, follow


class PairSteps:
    """The source of a run's steps; a `train.source.StepSource`.

    Raises:
        CheckpointError: on every rank, for a reference model that cannot be had.
    """

    def __init__(self, run: RunConfig, engine: Engine, tokenizer: Tokenizer, loader: PairLoader):
        del tokenizer
        self.engine, self.loader = engine, loader
        self.objective = PreferenceObjective(run.section(DPOConfig))
        self.sets, loader.started_from = open_reference(engine)
        self.between = True
        self.metrics: dict[str, float] = {}
        self.table: list[dict[str, Any]] = []

    def next_step(self, stop: bool) -> tuple[Sequence[PreferenceBatch], bool]:
        """See `train.source.StepSource.next_step`. The reference answers for the microbatches that
        are trained on, in one swap of weights: at equal weights its numbers are the policy's."""
        batches: list[CompletionBatch]
        batches, stopping = receive_step(self.engine.groups, self.loader, stop)
        if stopping:
            return [], True
        with self.sets.swapping() as put:
            put(REFERENCE)
            known = trainer_logprobs(self.engine, batches, 1.0)
        delta = self.loader.delta
        self.metrics = {"rewards/delta": delta}
        made = [preference_batch(b, of, delta) for b, of in zip(batches, known, strict=True)]
        return made, False

    def stepped(self, metrics: Mapping[str, float]) -> None:
        """Takes the rewards of a step into their mean; moves the reference, if it is due."""
        mean = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
        self.loader.take_rewards(mean, int(metrics["train/pairs"]))
        follow(self.sets, self.engine)

    def close(self) -> None:
        self.loader.close()

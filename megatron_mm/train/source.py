"""Where the loop's steps come from, by the name of the objective: rows as they are, or what the
model makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from megatron_mm.config import RunConfig
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.loading.loader import TrainLoader
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import receive
from megatron_mm.engine.objective import Objective, SupervisedFineTuning
from megatron_mm.errors import DataError
from megatron_mm.rl.rollout.experience import Experience
from megatron_mm.rl.rollout.prompts import PromptLoader


class StepSource(Protocol):
    """
    Attributes:
        loader: the position in the data, to be saved.
        objective: what the steps optimise.
        metrics: of the last step, beside the objective's own.
        table: of the last step, rows to show; on one rank of each replica.
        between: whether a run may be saved here and go on later, nothing lost or repeated.
    """

    loader: TrainLoader | PromptLoader
    objective: Objective
    metrics: dict[str, float]
    table: list[dict[str, Any]]
    between: bool

    def next_step(self, stop: bool) -> tuple[Sequence[Microbatch], bool]:
        """This rank's microbatches of the next step, and whether any rank wants to stop before
        it: then the position is as it was. Every rank of the job calls it.

        Raises:
            DataError: on every rank; the position is as it was.
        """
        ...

    def close(self) -> None: ...


class Supervised:
    """Rows with their answers."""

    def __init__(self, run: RunConfig, engine: Engine, tokenizer: Tokenizer, loader: TrainLoader):
        del run, tokenizer
        self.groups, self.loader = engine.groups, loader
        self.objective = SupervisedFineTuning()
        self.between = True
        self.metrics: dict[str, float] = {}
        self.table: list[dict[str, Any]] = []

    def next_step(self, stop: bool) -> tuple[list[Microbatch], bool]:
        position, loader = self.loader.state_dict(), self.loader
        try:
            batches, stopping = receive(
                self.groups, loader.next_batch, stop, lambda: loader.fingerprint
            )
        except DataError:
            loader.load_state_dict(position)  # some readers had read, others had not
            raise
        if stopping:
            loader.load_state_dict(position)  # what was read is read again on resume
        elif not self.groups.is_reader:
            loader.pass_over()
        return batches, stopping

    def close(self) -> None:
        self.loader.close()


SOURCES: dict[str, Callable[..., StepSource]] = {"sft": Supervised, "grpo": Experience}

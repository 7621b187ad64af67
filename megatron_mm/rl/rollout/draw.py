"""Draws a rollout: rows of the training data, and completions of each by the model in training."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from megatron_mm.data.loading.reader import Prompt
from megatron_mm.data.looks import LookTokens
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import broadcast_from_reader
from megatron_mm.generation.generate import Prompts, generate
from megatron_mm.generation.lanes import Completion
from megatron_mm.generation.sampling import Sampling
from megatron_mm.rl.rollout.prompts import Drawn, PromptSource
from megatron_mm.rl.settings import resolved, rollout_plan


@dataclass(frozen=True)
class Group:
    """A prompt and its completions, on every rank of the replica that generated them.

    Attributes:
        number: of the row in the data's order; no two groups of the job share one.
        completions: `num_generations` of them.
        prompt: on the replica's reader; None elsewhere.
    """

    number: int
    completions: tuple[Completion, ...]
    prompt: Prompt | None

    @property
    def asked(self) -> Prompt:
        """The prompt, for work of the reader."""
        assert self.prompt is not None, "prompts are on the replica's reader alone"
        return self.prompt


@dataclass(frozen=True)
class Rollout:
    """One round of drawing, this replica's part.

    Attributes:
        groups: in the data's order.
        skipped: the rows that could not be read, each as "file:row: reason".
        seconds: how long it took.
    """

    groups: tuple[Group, ...]
    skipped: tuple[str, ...]
    seconds: float


def draw_rollout(
    engine: Engine, tokenizer: Tokenizer, loader: PromptSource, *, record_routes: bool
) -> Rollout:
    """Draws the next `rollout_batch_size` prompts of the job and completes this replica's. Every
    rank of the job calls it. Raises as `complete`."""
    numbers = loader.numbers(rollout_plan(engine.run).prompts)
    return complete(engine, tokenizer, loader, numbers, record_routes=record_routes)


class PromptRows(Protocol):
    """Rows that have numbers."""

    def read(self, numbers: list[int]) -> Drawn:
        """Reads rows by number, on the replica's reader; may raise DataError."""
        ...


def complete(
    engine: Engine,
    tokenizer: Tokenizer,
    rows: PromptRows,
    numbers: list[int],
    *,
    record_routes: bool,
) -> Rollout:
    """Completes rows of this replica, as many times as the settings say. Every rank of the job
    calls it.

    Args:
        numbers: of this replica's rows, unique in the job: draws follow from them.
    Raises:
        DataError: on every rank, for a row that cannot be read.
    """
    begin, groups, rl = time.perf_counter(), engine.groups, resolved(engine.run)
    prompts: list[Prompt] = []

    def read() -> tuple[list[int], list[str]]:
        drawn = rows.read(numbers)
        prompts.extend(drawn.prompts)
        return drawn.kept, drawn.skipped

    kept, skipped = broadcast_from_reader(groups, read)
    completions = generate(
        engine,
        Prompts(lambda index: prompts[index].sample, kept),
        Sampling(
            tokenizer.end_ids,
            rl.max_completion_length,
            rl.temperature,
            rl.top_p,
            rl.top_k,
            engine.run.training.seed,
            rl.earl.router_temperature,
            LookTokens.of(engine.run, tokenizer),
        ),
        num_generations=rl.num_generations,
        max_num_seqs=rl.max_num_seqs,
        pad_id=tokenizer.pad_id,
        record_routes=record_routes,
    )
    assert completions is not None  # nothing stops this generation
    drawn = tuple(
        Group(number, tuple(completions[i]), prompts[i] if groups.is_reader else None)
        for i, number in enumerate(kept)
    )
    return Rollout(drawn, tuple(skipped), time.perf_counter() - begin)


def moe_layers(engine: Engine) -> list[int]:
    """Returns the moe indices of this rank's layers of experts, in the order of a completion's
    routes."""
    return sorted(index for chunk in engine.chunks for index in chunk.moe_layers)

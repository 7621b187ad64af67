"""The source of the loop's steps: rows as they are, or what the model makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from megatron_mm.config import RunConfig
from megatron_mm.config.objectives import part_of
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.tokenizer import Tokenizer, load_tokenizer
from megatron_mm.earl.alignment import expert_scope
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import raise_together
from megatron_mm.engine.objective import PARTS, Objective
from megatron_mm.errors import ConfigError, DataError, RLError
from megatron_mm.parallel.groups import Groups


class Loader(Protocol):
    """The loader of training rows, with its position.

    Attributes:
        consumed_samples: rows that all replicas together have used.
        order: a description of the data's order, as plain values.
    """

    consumed_samples: int
    order: dict[str, Any]

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StepSource(Protocol):
    """
    Attributes:
        loader: the position in the data, to be saved.
        objective: what the steps optimise.
        metrics: of the last step, beside the objective's own; the same on every rank.
        table: of the last step, rows to show; on one rank of each replica.
        between: whether a run may be saved here and go on later, nothing lost or repeated.
    """

    loader: Loader
    objective: Objective[Any]  # of the batches that `next_step` returns
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

    def stepped(self, metrics: Mapping[str, float]) -> None:
        """Takes in what a step measured, the same on every rank, after its update and before the
        position is saved. A step that is held back is not told."""
        ...

    def close(self) -> None: ...


SOURCE_PARTS = (
    *("loader", "objective", "metrics", "table", "between"),
    *("next_step", "stepped", "close"),
)


def open_data(run: RunConfig, groups: Groups) -> tuple[Tokenizer, Loader]:
    """The tokenizer and the loader of the run's objective. Opened on every rank, since files and
    positions are the same.

    Raises:
        DataError: on every rank, if any rank cannot open them.
    """
    tokenizer: Any = None
    loader: Any = None
    error = None
    ranks = {
        "data_parallel_rank": groups.pg.dp.rank(),
        "data_parallel_size": groups.pg.dp.size(),
    }
    try:
        if not run.data.tokenizer_model:
            raise DataError("tokenizer_model is not set: name a .model file or a folder")
        tokenizer = load_tokenizer(run.data.tokenizer_model, run.data.end_tokens)
        loader = part_of(run, "loader")(run, tokenizer, **ranks)
    except (ConfigError, DataError, RLError) as problem:
        error = str(problem)
    raise_together(groups, error)
    return tokenizer, loader


def open_expert_scope(run: RunConfig, groups: Groups) -> torch.Tensor | None:
    """`earl.alignment.expert_scope`. Every rank calls it.

    Raises:
        DataError: on every rank, if the map cannot be used on any of them.
    """
    scope = error = None
    try:
        scope = expert_scope(run)
    except RLError as problem:
        error = str(problem)
    raise_together(groups, error)
    return scope


def open_step_source(
    run: RunConfig, engine: Engine, tokenizer: Tokenizer, loader: Loader
) -> StepSource:
    """The step source of the run's objective. Every rank calls it.

    Raises:
        DataError: on every rank, if the source or its objective cannot be imported or lacks a
            part on any of them.
    """
    make: Any = None
    source: Any = None
    error = None
    try:
        make = part_of(run, "source")
    except ConfigError as problem:
        error = str(problem)
    raise_together(engine.groups, error)  # before `make`, which may wait for other ranks
    try:
        source = make(run, engine, tokenizer, loader)
        _check_parts(run, "source", source, SOURCE_PARTS)
        _check_parts(run, "objective", source.objective, PARTS)
    except ConfigError as problem:
        error = str(problem)
    raise_together(engine.groups, error)
    return source


def _check_parts(run: RunConfig, what: str, made: Any, parts: Sequence[str]) -> None:
    for part in parts:
        if not hasattr(made, part):
            raise ConfigError(
                f"objective {run.training.objective}: its {what} {type(made).__name__} has no "
                f"`{part}`; it needs {', '.join(parts)}"
            )

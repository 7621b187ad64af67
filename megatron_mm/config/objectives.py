"""The objectives that a run can have, and what a run must know about one before torch is loaded.

An objective is declared by one `Declaration`. Registered ones have a name; any other is given by
the dotted path of its declaration:

    SMOOTHED = Declaration("my_objectives.LabelSmoothing", sections={"smoothing": Smoothing})

    python -m megatron_mm.train --objective my_objectives.SMOOTHED --label-smoothing 0.2
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from megatron_mm.errors import ConfigError
from megatron_mm.plugins import Registry, import_object

if TYPE_CHECKING:
    from megatron_mm.config.settings import RunConfig

Part = str | Callable[..., Any]


def balance_of_model(run: RunConfig) -> float:
    """The model's own coefficient of the load-balancing loss."""
    return run.model.language.moe_aux_loss_coeff


def rows_of_steps(run: RunConfig) -> int:
    """A row for each place of every step."""
    return run.training.train_iters * run.training.global_batch_size


@dataclass(frozen=True)
class Declaration:
    """One objective. Parts that need torch are dotted paths, imported when they are used.

    Attributes:
        objective: (run) -> `engine.objective.Objective`, for the sources that are given one. None
            if `source` makes its own.
        source: (run, engine, tokenizer, loader) -> `train.source.StepSource`.
        loader: (run, tokenizer, *, data_parallel_rank, data_parallel_size) -> the loader of
            `source`.
        sections: its settings: key in files -> dataclass. Objectives may share a section.
        check: raises ConfigError for settings that do not fit the run.
        check_replicas: (run, replicas), raises ConfigError for settings that do not fit them.
        console: metrics shown on the console before the common ones; the first is the loss that
            `loss_spike_factor` guards.
        before: (engine, tokenizer, output_dir, stop), called before the first step of a run that
            writes a report: it records what the report compares the trained model with.
        moe_aux_loss_coeff: the coefficient of the load-balancing loss of a run.
        generates: whether its steps are made of rollouts, which the model generates itself.
        rows: the least number of training rows that a run needs.
        rows_when_packed: whether it needs as many where samples are packed.
        mean_over_tokens: whether its loss is a mean over the answers' tokens, on whose scale the
            losses of layers (box loss) are.
    """

    objective: Part | None = None
    source: Part = "megatron_mm.train.sft.Supervised"
    loader: Part = "megatron_mm.train.sft.open_rows"
    sections: Mapping[str, type] = field(default_factory=dict)
    check: Callable[[RunConfig], None] | None = None
    check_replicas: Callable[[RunConfig, int], None] | None = None
    console: tuple[str, ...] = ("train/lm_loss",)
    before: Part | None = None
    moe_aux_loss_coeff: Callable[[RunConfig], float] = balance_of_model
    generates: bool = False
    rows: Callable[[RunConfig], int] = rows_of_steps
    rows_when_packed: bool = False
    mean_over_tokens: bool = True


OBJECTIVES: Registry[Declaration] = Registry(
    "objective",
    {
        "sft": "megatron_mm.train.declaration.SFT",
        "grpo": "megatron_mm.rl.declaration.GRPO",
        "dpo": "megatron_mm.preference.declaration.DPO",
    },
    kind="Declaration",
    needs=[part.name for part in fields(Declaration)],
)


def declaration(run: RunConfig) -> Declaration:
    """The declaration of the run's objective.

    Raises:
        ConfigError: for an unknown objective, or one that lacks a part.
    """
    return OBJECTIVES[run.training.objective]


def make_known(name: Any) -> None:
    """Registers the objective at a dotted path under its path, so that its section is known.

    Raises:
        ConfigError: for an unknown name, or an objective that cannot be imported or lacks a part.
    """
    # A value of another type has its message when the settings are read.
    if isinstance(name, str) and name not in OBJECTIVES:
        _ = OBJECTIVES[name]
        OBJECTIVES.register(name, name)


def part_of(run: RunConfig, name: str) -> Callable[..., Any]:
    """A part of the run's objective, imported.

    Raises:
        ConfigError: if it cannot be imported, or the objective does not have it.
    """
    objective = run.training.objective
    part = getattr(OBJECTIVES[objective], name)
    if part is None:
        raise ConfigError(f"objective {objective} has no `{name}`, which its source needs")
    what = f"`{name}` of objective {objective}:"
    return import_object(part, what, kind="callable") if isinstance(part, str) else part


def check_objective(run: RunConfig) -> None:
    """Checks the objective's settings, and that no other objective has any.

    Raises:
        ConfigError: for the first setting that does not fit.
    """
    name = run.training.objective
    declared = OBJECTIVES[name]
    for section, settings in run.objectives.items():
        if section in declared.sections:
            continue
        default = type(settings)()
        for key, value in vars(settings).items():
            off = getattr(default, key)
            if value != off:
                raise ConfigError(
                    f"{section}.{key} is {value!r}; allowed: {off!r} with objective {name}, which "
                    f"does not read the section {section}"
                )
    if declared.check is not None:
        declared.check(run)

"""The run of a checkpoint, for the commands here that compute with its model: on any layout and
backend, with settings of an evaluation beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_mm import cli
from megatron_mm.config import ConfigError, RunConfig, load, run_of_checkpoint, validate
from megatron_mm.config.flags import parse_flags
from megatron_mm.config.settings import CheckpointConfig
from megatron_mm.config.untrained import untrained

# Settings of the run that may be given beside the layout and the backend.
GIVEN = (
    *("tokenizer_model", "eval_samples", "eval_batch_size", "max_new_tokens"),
    # Other rows than the run's may have other columns and be longer.
    *("extra_columns", "seq_length", "max_num_tiles", "max_image_tokens"),
)

NOT_STORED = ("backend", "rl", "earl", "mimic")  # sections of a checkpoint that nothing here reads


def check_flags(rest: Sequence[str], doing: str) -> None:
    """Checks the run's flags of a command.

    Args:
        doing: the command's work, as in "discovering".
    Raises:
        ConfigError: another setting is among them.
    """
    for path in parse_flags(rest).values:
        if path[0] not in ("parallel", "backend", "plugins") and path[-1] not in GIVEN:
            raise ConfigError(
                f"{cli.flag(path[-1])} is not for {doing}; allowed: this tool's flags, --plugins, "
                f"the layout, the backend and {', '.join(map(cli.flag, GIVEN))}"
            )


def stored_run(
    stored: Mapping[str, Any], rest: Sequence[str], world: int, valid_data: str | None
) -> RunConfig:
    """Returns the run that made a checkpoint, with the layout and settings of the flags `rest`.

    Args:
        stored: the settings in the checkpoint.
        world: the number of ranks; valid_data: a file of questions.
    Raises:
        ConfigError: the settings do not fit.
    """
    given = load(None, list(rest))
    run = run_of_checkpoint({k: v for k, v in stored.items() if k not in NOT_STORED})
    run = untrained(replace(run, parallel=given.parallel, backend=given.backend), world)
    named = {path[-1]: value for path, value in parse_flags(rest).values.items()}
    data = replace(run.data, valid_data=valid_data)
    run = replace(
        run,
        checkpoint=CheckpointConfig(),
        data=replace(data, **{k: v for k, v in named.items() if hasattr(data, k)}),
        evaluation=replace(
            run.evaluation, **{k: v for k, v in named.items() if hasattr(run.evaluation, k)}
        ),
    )
    validate(run, world)
    return run

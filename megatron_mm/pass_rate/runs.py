"""The run of a checkpoint as the commands here use it: the model of the checkpoint, on any layout,
with the sampling and the rewards that the flags say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_mm import cli
from megatron_mm.config import RunConfig, load, to_dict, validate
from megatron_mm.config.flags import parse_flags
from megatron_mm.config.layers.queries import query_settings
from megatron_mm.config.settings_model import ModelConfig
from megatron_mm.data.files.keys import ANY
from megatron_mm.earl.knock_out import digest
from megatron_mm.earl.stored_run import stored_run
from megatron_mm.errors import ConfigError
from megatron_mm.rl.settings import RLConfig, difficulty_name

DATA = (
    *("tokenizer_model", "end_tokens", "extra_columns", "on_bad_sample", "memory_images"),
    *("seq_length", "max_num_tiles", "max_image_tokens"),
)
TRAINING = ("seed", "micro_batch_size")
SAMPLING = ("max_completion_length", "temperature", "top_p", "top_k", "max_num_seqs")
REWARDS = (
    *("num_generations", "reward_funcs", "difficulty_reward", "difficulty_threshold"),
    *("reward_num_workers", "reward_timeout", "reward_memory", "reward_batch_size"),
    *("reward_lost_value", "max_reward_failures"),
)


def run_of_flags(
    stored: Mapping[str, Any], rest: Sequence[str], world: int, *, scores: bool
) -> RunConfig:
    """Returns the run of a checkpoint with the trainer's flags `rest`.

    Args:
        stored: the settings in the checkpoint.
        world: the number of ranks.
        scores: whether completions are scored, which makes it a run of reinforcement learning, with
            its columns. Else any column is allowed.
    Raises:
        ConfigError: a flag is not one of this command's, or the settings do not fit.
    """
    allowed = (*DATA, *TRAINING, *SAMPLING, *(REWARDS if scores else ()))
    if not scores:
        allowed = tuple(name for name in allowed if name != "extra_columns")
    for path in parse_flags(rest).values:
        if path[0] not in ("parallel", "backend", "plugins") and path[-1] not in allowed:
            raise ConfigError(
                f"{cli.flag(path[-1])} is not for this command; allowed: its own flags, --plugins, "
                f"the layout, the backend and {', '.join(map(cli.flag, allowed))}"
            )
    given = load(None, list(rest))
    run, rl = stored_run(stored, rest, world, None), given.section(RLConfig)
    kept = (*SAMPLING, *(REWARDS if scores else ()))
    objectives = RunConfig().objectives | {"rl": RLConfig(**{k: getattr(rl, k) for k in kept})}
    training = replace(
        run.training,
        seed=given.training.seed,
        micro_batch_size=given.training.micro_batch_size,
    )
    if not scores:
        data = replace(run.data, extra_columns=[ANY])
        return replace(run, data=data, training=training, objectives=objectives)
    # As many as any micro_batch_size and layout divide; rounds are of their own size.
    completions = (
        rl.num_generations * run.training.global_batch_size * given.training.micro_batch_size
    )
    training = replace(training, objective="grpo", global_batch_size=completions)
    data = replace(run.data, packing=False, num_workers=0)  # of training, and not for rollouts
    model = _without_box_loss(run.model)
    run = replace(run, model=model, data=data, training=training, objectives=objectives)
    validate(run, world)
    difficulty_name(rl)
    return run


def _without_box_loss(model: ModelConfig) -> ModelConfig:
    settings = query_settings(model)
    if settings is None:
        return model
    glimpses = replace(settings, query_box_loss_coeff=0.0)
    return replace(model, layers=dict(model.layers) | {"Q": glimpses})


def key_of(run: RunConfig, *parts: object) -> str:
    """Returns a digest of what completions and scores depend on, and of `parts`. The layout is none
    of it."""
    tree = to_dict(run)
    same = {name: tree[name] for name in ("model", "data", "backend", "rl")}
    return digest(sorted(same.items()), run.training.seed, run.training.bf16, *parts)

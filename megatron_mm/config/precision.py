"""Checks of the backend: what FP8's matrix products can take, and settings that fit together.

A product in FP8 has rows of 16 bytes: every dimension it sums over is a multiple of 16 (32 for
mxfp8, whose scaling blocks are that long). Forward that is the inputs, for the input's gradient
the outputs, for the weight's gradient the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.config.pattern import num_layers
from megatron_mm.config.settings import BackendConfig, RunConfig
from megatron_mm.errors import ConfigError


def fp8_alignment(run: RunConfig) -> int:
    """The number that tokens and features of the language stack are multiples of; 1 without FP8."""
    if run.backend.fp8_format is None:
        return 1
    return 32 if run.backend.fp8_recipe == "mxfp8" else 16


def token_multiple(run: RunConfig) -> int:
    """The number of tokens that a microbatch is padded to a multiple of, so that ranks hold equal,
    aligned shards."""
    parallel = run.parallel
    shards = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return shards * fp8_alignment(run)


def _features(run: RunConfig) -> Iterator[tuple[str, int]]:
    """(setting and its meaning, features on one rank) of both sides of every linear in FP8."""
    yield "hidden_size", run.model.language.hidden_size
    for kind in LAYERS.used(run.model.hybrid_layer_pattern):
        yield from kind.fp8_features(run)


def check_backend(run: RunConfig) -> None:
    """Raises ConfigError for settings of the backend that cannot work together."""
    backend, fp8 = run.backend, run.backend.fp8_format
    engine = backend.transformer_impl == "transformer_engine"
    if engine and not run.training.bf16:
        raise ConfigError(
            "transformer_impl is 'transformer_engine'; allowed: 'local', or bf16 true"
        )
    if backend.compile_vision and run.parallel.tensor_model_parallel_size > 1:
        # Compiled ranks were seen to reduce in different orders: a hang, or wrong sums.
        raise ConfigError(
            f"compile_vision is true with tensor_model_parallel_size "
            f"{run.parallel.tensor_model_parallel_size}; allowed: false, or 1"
        )
    if backend.deterministic_mode:
        _check_deterministic(run)
    _check_idle(run)
    if fp8 is None:
        return
    if not engine:
        raise ConfigError(
            f"fp8_format is {fp8!r}; allowed: none, or {fp8} with transformer_impl "
            f"transformer_engine"
        )
    by = fp8_alignment(run)
    for key, size in _features(run):
        if size % by:
            raise ConfigError(
                f"{key} {size} on a tensor-parallel rank does not divide by {by}; allowed with "
                f"fp8_recipe {backend.fp8_recipe}: a multiple of {by}"
            )
    if backend.fp8_recipe == "delayed":
        _check_delayed(run)
    if backend.first_last_layers_bf16:
        _check_first_last(run)


def _check_idle(run: RunConfig) -> None:
    """Rejects settings that nothing would read."""
    backend, usual = run.backend, BackendConfig()
    for keys, other, read in (
        (("fp8_recipe", "first_last_layers_bf16"), "fp8_format", backend.fp8_format is not None),
        (
            ("fp8_amax_history_len", "fp8_amax_compute_algo"),
            "fp8_recipe delayed",
            backend.fp8_format is not None and backend.fp8_recipe == "delayed",
        ),
        (
            ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"),
            "first_last_layers_bf16",
            backend.first_last_layers_bf16,
        ),
    ):
        for key in keys:
            value, default = (_word(getattr(settings, key)) for settings in (backend, usual))
            if not read and value != default:
                allowed = f"{default}, or this value with {other}"
                raise ConfigError(f"{key} is {value}; allowed: {allowed}")


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _check_deterministic(run: RunConfig) -> None:
    """Rejects what does not compute the same again in another process."""
    if run.backend.compile_vision:
        raise ConfigError(
            "compile_vision is true; allowed with deterministic_mode: false (torch.compile picks "
            "kernels by its clock)"
        )
    for key, value, allowed, why in (
        # Which of them is fastest is measured anew in every process, and each rounds otherwise.
        ("gdn_kernel", run.backend.gdn_kernel, ("auto", "torch"), "fla picks tiles by its clock"),
        (
            "moe_token_dispatcher_type",
            run.parallel.moe_token_dispatcher_type,
            ("alltoall",),
            "DeepEP does not promise an order",
        ),
        (
            "fp8_recipe",
            run.backend.fp8_recipe,
            ("tensorwise", "blockwise", "mxfp8"),
            "checkpoints do not hold its history",
        ),
    ):
        if value not in allowed:
            raise ConfigError(
                f"{key} is {value!r}; allowed with deterministic_mode: {', '.join(allowed)} ({why})"
            )


def _check_delayed(run: RunConfig) -> None:
    """Rejects recomputed layers, which would enter their maxima into the history twice."""
    training = run.training
    whole = {kind.recompute for kind in LAYERS.used(run.model.hybrid_layer_pattern)}
    repeated = [module for module in training.recompute_modules if module in whole]
    if training.recompute_granularity == "full":
        again = "'full'"
    elif training.recompute_granularity == "selective" and repeated:
        again = f"'selective' with {repeated[0]}"
    else:
        return
    raise ConfigError(
        f"recompute_granularity is {again}; allowed with fp8_recipe delayed: 'selective' with "
        f"core_attn or vision, or none; or another recipe"
    )


def _check_first_last(run: RunConfig) -> None:
    backend = run.backend
    if backend.fp8_recipe == "delayed":
        # It reduces its maxima once a step, on leaving FP8, which the layers must not do singly.
        raise ConfigError("first_last_layers_bf16 is true; allowed: false with fp8_recipe delayed")
    layers = num_layers(run.model.hybrid_layer_pattern)
    most = layers // run.parallel.pipeline_model_parallel_size
    for key in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if getattr(backend, key) > most:
            raise ConfigError(
                f"{key} is {getattr(backend, key)}; allowed: 1 to {most} "
                f"(num_layers {layers} / pipeline_model_parallel_size)"
            )

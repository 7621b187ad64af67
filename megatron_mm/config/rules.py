"""Conditions that several checks share, with one wording for their messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_mm.errors import ConfigError

if TYPE_CHECKING:
    from megatron_mm.config.settings import ParallelConfig


def divides(key: str, value: int, by_key: str, by: int) -> None:
    """Raises ConfigError unless `value` is a positive multiple of `by`."""
    if value < 1 or value % by:
        nearest = -(-max(value, 1) // by) * by
        raise ConfigError(
            f"{key} {value} does not divide by {by_key} {by}; "
            f"allowed: a multiple of {by}, such as {nearest}"
        )


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raises ConfigError that names the allowed values, if the condition does not hold."""
    if not condition:
        raise ConfigError(f"{key} is {value!r}; allowed: {allowed}")


def head_ranks(parallel: ParallelConfig) -> tuple[str, int]:
    """Ranks that share the heads of a layer, and what makes them: context parallelism exchanges
    the sequence for heads inside a layer."""
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if cp == 1:
        return "tensor_model_parallel_size", tp
    return f"tensor_model_parallel_size * context_parallel_size ({tp} * {cp} =)", tp * cp


def expert_tensor_parallel_size(parallel: ParallelConfig) -> int:
    """Ranks that share the features of an expert; tensor_model_parallel_size unless set."""
    given = parallel.expert_tensor_parallel_size
    return parallel.tensor_model_parallel_size if given is None else given

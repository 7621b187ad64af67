"""Reward functions by built-in name or dotted path, in TRL's form or verl's."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_mm.errors import RLError
from megatron_mm.plugins import Registry, Spec
from megatron_mm.rl.rewards.text import text_of

_HERE = "megatron_mm.rl.rewards"

REWARDS: Registry[Callable[..., Any]] = Registry(
    "reward",
    {
        "exact": f"{_HERE}.text.exact",
        "scorer": f"{_HERE}.text.scorer",
        "multiple_choice": f"{_HERE}.choices.multiple_choice",
        "numeric": f"{_HERE}.numeric.numeric",
        "math": f"{_HERE}.mathematics.math_equal",
        "box_iou": f"{_HERE}.structured.box_iou",
        "anls": f"{_HERE}.text.anls",
        "tags": f"{_HERE}.text.tags",
        "pattern": f"{_HERE}.text.pattern",
        "soft_overlong": f"{_HERE}.text.soft_overlong",
        "json_match": f"{_HERE}.structured.json_match",
    },
    kind="function",
    error=RLError,
)


class RewardFunction:
    """A reward function and what its signature asks for.

    Attributes:
        wants: the columns it takes by name; None if it takes whatever there is (`**columns`).
        wants_routes: it names the argument `routed_experts`.
    """

    def __init__(self, spec: Spec) -> None:
        function = load_function(spec.path)
        parameters = inspect.signature(function).parameters
        self._function, self._options = function, spec.options
        self._verl = {"solution_str", "ground_truth"} <= parameters.keys()
        keywords = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        unknown = [key for key in spec.options if key not in parameters]
        if unknown and (not keywords or spec.path in REWARDS):
            raise RLError(
                f"reward {spec.path} takes no argument {unknown[0]!r}; "
                f"it takes {', '.join(parameters)}"
            )
        # Built-in ones have **columns only to be called as TRL calls them.
        named = self._verl or not keywords or spec.path in REWARDS
        taken = frozenset(parameters)
        if self._verl:
            taken |= {"data_source", "extra_info"}
        self.wants = taken if named else None
        self.wants_routes = "routed_experts" in parameters
        self._logs = "log_metric" in parameters

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        routed_experts: Sequence[Any] | None,
        log_metric: Callable[[str, float], None],
    ) -> Any:
        """Calls the function and returns its result, that of a coroutine after running it.

        Args:
            columns: the rows' other keys, each with one value a completion.
            routed_experts: int16 [positions, layers, k] of each completion.
        """
        given: dict[str, Any] = dict(columns)
        given |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        if self.wants_routes:
            given["routed_experts"] = routed_experts
        if self._logs:
            given["log_metric"] = log_metric
        if self._verl:
            return [self._score_verl(i, given) for i in range(len(completions))]
        if self.wants is not None:
            given = {key: value for key, value in given.items() if key in self.wants}
        return _finish(self._function(**given | self._options))

    def _score_verl(self, i: int, given: Mapping[str, Sequence[Any]]) -> Any:
        """Calls verl's `compute_score(data_source, solution_str, ground_truth, extra_info)` on one
        sample, and returns its score; verl also allows a dict with the score as `score`."""

        def of(column: str) -> Any:
            return given[column][i] if column in given else None

        values = {"solution_str": text_of(given["completions"][i])}
        values |= {key: of(key) for key in ("data_source", "ground_truth", "extra_info")}
        parameters = inspect.signature(self._function).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            values = {key: value for key, value in values.items() if key in parameters}
        result = _finish(self._function(**values | self._options))
        return result["score"] if isinstance(result, Mapping) else result


def _finish(result: Any) -> Any:
    async def wait() -> Any:
        return await result

    return asyncio.run(wait()) if inspect.isawaitable(result) else result


def load_function(path: str) -> Callable[..., Any]:
    """Returns the function of a built-in name or dotted path.

    Raises:
        RLError: in one line, for a path that cannot be imported or is no function.
    """
    function = REWARDS[path]
    if not callable(function):
        raise RLError(f"reward {path} is a {type(function).__name__}; give a function")
    return function

"""Reward functions by built-in name or dotted path, in TRL's forms or verl's."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_mm.errors import RLError
from megatron_mm.plugins import Registry, Spec, parse_specs
from megatron_mm.rl.rewards.forms import Reading, as_messages, as_texts
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
        "look_if_right": f"{_HERE}.looking.look_if_right",
        "look_iou": f"{_HERE}.looking.look_iou",
    },
    kind="function",
    error=RLError,
)


# Rewards that are no functions, under whose names metrics are logged too (rl/credit.py).
OTHERS = ("router", "kl")


def parse_rewards(entries: Sequence[str]) -> list[Spec]:
    """Parses `reward_funcs`, without importing.

    Raises:
        RLError: an entry is written wrongly.
    """
    return parse_specs(entries, REWARDS, OTHERS)


class RewardFunction:
    """A reward function and what its signature asks for.

    Attributes:
        wants: the columns it takes by name; None if it takes whatever there is (`**columns`).
        wants_routes: it names the argument `routed_experts`.
        built_in: it is one of this package's, which read texts and conversations alike.
    """

    def __init__(self, spec: Spec) -> None:
        function = load_function(spec.path)
        parameters = inspect.signature(function).parameters
        self._function, self._options = function, spec.options
        self.built_in = getattr(function, "__module__", "").startswith(f"{_HERE}.")
        self._reads_messages = {"prompts": False, "completions": False}
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
        # Their options are keyword-only: a column of such a name is no option.
        options = {k for k, p in parameters.items() if self.built_in and p.kind is p.KEYWORD_ONLY}
        taken = frozenset(parameters) - options
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
            routed_experts: int16 [positions, layers, k] of each completion, hop by hop; -2 where
                a layer did not hand the token on.
        """
        given: dict[str, Any] = dict(columns)
        given |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        if self.wants_routes:
            given["routed_experts"] = routed_experts
        if self._verl:
            return [self._score_verl(i, given) for i in range(len(completions))]
        logged: list[tuple[str, float]] = []
        call = self._call if self.built_in else self._in_its_form
        result = call(given, logged)
        for name, value in logged:
            log_metric(name, value)
        return result

    def _in_its_form(self, given: Mapping[str, Any], logged: list[tuple[str, float]]) -> Any:
        """Calls the function with texts, and once more with messages where it reads texts so; see
        `forms`. What the first call logged is thrown away."""
        result, error, reading = self._try(given, logged)
        if isinstance(error, IndexError) and any(r.at_nothing for r in reading.values()):
            # An empty completion has no first character and no first message: ask with another.
            *_, reading = self._try(given, logged, empty=" ")
        while any(r.as_messages for r in reading.values()):
            # As in TRL, who reads completions as messages gets prompts as messages too.
            self._reads_messages["prompts"] = True
            self._reads_messages["completions"] |= reading["completions"].as_messages
            result, error, reading = self._try(given, logged)
        if error is not None:
            raise error
        return result

    def _try(
        self, given: Mapping[str, Any], logged: list[tuple[str, float]], empty: str = ""
    ) -> tuple[Any, BaseException | None, dict[str, Reading]]:
        """Returns the result or the exception of a call, and how texts were read in it."""
        reading = {key: Reading() for key in self._reads_messages}
        roles = {"prompts": "user", "completions": "assistant"}
        formed = {
            key: as_messages(given[key], roles[key])
            if messages
            else as_texts(given[key], reading[key], empty)
            for key, messages in self._reads_messages.items()
        }
        logged.clear()
        try:
            return self._call({**given, **formed}, logged), None, reading
        except BaseException as error:
            return None, error, reading

    def _call(self, given: Mapping[str, Any], logged: list[tuple[str, float]]) -> Any:
        if self._logs:
            given = {**given, "log_metric": lambda name, value: logged.append((name, value))}
        if self.wants is not None:
            given = {key: value for key, value in given.items() if key in self.wants}
        return _finish(self._function(**{**given, **self._options}))

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
        if not isinstance(result, Mapping):
            return result
        if "score" not in result:
            keys = ", ".join(map(str, result)) or "no key"
            raise RLError(f"returned a dict without 'score'; it has {keys}")
        return result["score"]


def _finish(result: Any) -> Any:
    async def wait() -> Any:
        return await result

    return asyncio.run(wait()) if inspect.isawaitable(result) else result


def reads_routes(reward_funcs: Sequence[str]) -> bool:
    """Whether any of these functions names the argument `routed_experts`.

    Raises:
        RLError: in one line, for functions that cannot be loaded.
    """
    return any(RewardFunction(spec).wants_routes for spec in parse_rewards(reward_funcs))


def load_function(path: str) -> Callable[..., Any]:
    """Returns the function of a built-in name or dotted path.

    Raises:
        RLError: in one line, for a path that cannot be imported or is no function.
    """
    function = REWARDS[path]
    if not callable(function):
        raise RLError(f"reward {path} is a {type(function).__name__}; give a function")
    return function

"""The process that reward functions run in: reads calls from a pipe, writes scores back."""

from __future__ import annotations

import fcntl
import math
import os
import select
import signal
from collections.abc import Mapping, Sequence, Set
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from megatron_mm.plugins import Spec
from megatron_mm.rl.rewards.functions import RewardFunction

LARGEST = 1e30  # a reward; sums of squares of larger ones are not finite
MAX_REASON = 300  # characters of a failure's reason that are kept


class Call(NamedTuple):
    """Samples for one function; all lists are of one length."""

    function: int
    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[Any]
    columns: dict[str, list[Any]]
    routed_experts: list[Any] | None


class Score(NamedTuple):
    """The score of one sample: a number, None where the reward does not apply, or the reason of a
    failure."""

    value: float | None
    reason: str | None = None


class Answer(NamedTuple):
    """The worker's answer to a call.

    Attributes:
        scores: one for each sample.
        logged: numbers that the function gave to `log_metric`, by the metric's name.
    """

    scores: list[Score]
    logged: list[tuple[str, float]]


class Lost(NamedTuple):
    """The loss of a worker, in place of its answer; it has to be replaced."""

    reason: str
    timed_out: bool = False


class Ready(NamedTuple):
    """A worker's first answer: what it has to know of each function (see RewardFunction)."""

    wants: list[frozenset[str] | None]
    wants_routes: list[bool]
    built_in: list[bool]


def work(pipe: Connection, lifeline: Connection, specs: Sequence[Spec]) -> None:
    """Answers calls until the trainer's process ends or closes the pipe. The first answer is a
    Ready, or a text that says why functions cannot be loaded."""
    os.setsid()  # a group of its own, so that whatever a function starts ends with it
    end_with_parent(lifeline)
    _silence()
    try:
        functions = [RewardFunction(spec) for spec in specs]
    except BaseException as error:
        pipe.send(one_line(error))
        return
    pipe.send(
        Ready(
            [f.wants for f in functions],
            [f.wants_routes for f in functions],
            [f.built_in for f in functions],
        )
    )
    while True:
        try:
            call: Call = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(scores_of(functions[call.function], call))


def scores_of(function: RewardFunction, call: Call) -> Answer | str | Lost:
    """Returns one score for each sample, or the reason why the call has none; a Lost where a
    completion was too much for a built-in function."""
    count = len(call.completions)
    logged: list[tuple[str, float]] = []

    def log_metric(name: str, value: float) -> None:
        logged.append((str(name), float(value)))

    try:
        result = function(
            call.prompts,
            call.completions,
            call.completion_ids,
            call.columns,
            call.routed_experts,
            log_metric,
        )
        # Tensors and arrays have tolist.
        values = result.tolist() if hasattr(result, "tolist") else result
        # Their elements are no rewards, or come in no order.
        if isinstance(values, (str, bytes, bytearray, memoryview, Mapping, Set)):
            return f"returned a {type(values).__name__}, not a list of rewards"
        values = list(values)
        if len(values) != count:
            return f"returned {len(values)} rewards for {count} completions"
        return Answer([_score(value) for value in values], logged)
    except (MemoryError, RecursionError, OverflowError) as error:
        return Lost(one_line(error)) if function.built_in else one_line(error)
    except BaseException as error:  # SystemExit too
        return one_line(error)


def _score(value: Any) -> Score:
    if value is None:
        return Score(None)
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        return Score(None, f"returned a {type(value).__name__}, not a number")
    except OverflowError:
        number = math.inf
    # Rewards are added in fp32.
    return Score(number) if abs(number) <= LARGEST else Score(None, f"returned {number}")


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 3] + "..."


def end_with_parent(lifeline: Connection) -> None:
    """Has the kernel kill this process group when the other end of `lifeline` closes, which happens
    however the trainer ends. A waiting thread would not do: a regular expression that hangs holds
    Python's lock."""
    fd = lifeline.fileno()
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(fd, fcntl.F_SETOWN, -os.getpid())
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
    # The pipe may have closed before this was set up.
    poll = select.poll()
    poll.register(fd, select.POLLHUP)
    if poll.poll(0):
        os._exit(1)


def _silence() -> None:
    """Throws away what functions print: it may be megabytes for each call, from many ranks."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    os.close(nowhere)

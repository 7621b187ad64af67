"""Messages between the two ends of a reward worker, and how they cross the pipe.

A message is its length (8 bytes, little-endian) and its body. The trainer's calls are pickled: a
worker trusts the trainer. A worker runs other people's code, so what comes back is JSON, and
`answer_of` checks every part of it: nothing of a worker's is ever unpickled, and an answer holds
numbers, names and reasons only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

LARGEST = 1e30  # a reward; sums of squares of larger ones are not finite
MAX_REASON = 300  # characters of a failure's reason that are kept
MAX_NAME = 200  # characters of a logged metric's name
MAX_ANSWER = 1 << 24  # bytes; a score takes about 30
HEAD = 8


class Call(NamedTuple):
    """Samples for one function; all lists are of one length."""

    number: int
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


class Begun(NamedTuple):
    """The worker has read its call and begins with it."""


class Failed(NamedTuple):
    """The reason why a call, or a start, came to nothing; the worker is as good as before."""

    reason: str


class Lost(NamedTuple):
    """The loss of a worker, in place of its answer; it has to be replaced.

    Attributes:
        out_of_memory: it reached its limit, perhaps with what earlier calls left behind.
    """

    reason: str
    timed_out: bool = False
    out_of_memory: bool = False


class Ready(NamedTuple):
    """A worker's first answer: what it has to know of each function (see RewardFunction)."""

    wants: list[frozenset[str] | None]
    wants_routes: list[bool]
    built_in: list[bool]


type Message = Ready | Begun | Answer | Failed | Lost


def framed(body: bytes) -> bytes:
    """Returns a message as it crosses the pipe."""
    return len(body).to_bytes(HEAD, "little") + body


def read_body(fd: int) -> bytes:
    """Returns the body of the next message; waits for it.

    Raises:
        EOFError: the other end is closed.
    """

    def read(count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = os.read(fd, min(count - len(parts), 1 << 20))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    return read(int.from_bytes(read(HEAD), "little"))


def write_body(fd: int, body: bytes) -> None:
    """Writes a message; waits until it is gone."""
    rest = memoryview(framed(body))
    while rest:
        rest = rest[os.write(fd, rest) :]


def body_of(number: int, message: Message) -> bytes:
    """Returns the body of a worker's message about call `number`; 0 is its start."""
    plain: dict[str, Any] = {"call": number}
    match message:
        case Ready(wants, routes, built_in):
            taken = [None if names is None else sorted(names) for names in wants]
            plain["ready"] = [taken, routes, built_in]
        case Begun():
            plain["begun"] = True
        case Answer(scores, logged):
            plain["scores"], plain["logged"] = scores, logged
        case Failed(reason):
            plain["failed"] = reason
        case Lost(reason, _, out_of_memory):
            plain["lost"] = [reason, out_of_memory]
    return json.dumps(plain).encode()


def answer_of(body: bytes, number: int, count: int) -> Message:
    """Returns the message in the body that a worker sent.

    Args:
        number: of the call that it works on.
        count: the samples of that call; of its start, the functions.

    Raises:
        ValueError: it is none, or one about another call.
    """
    try:
        plain = json.loads(body)
    except (ValueError, RecursionError):  # not text, no JSON, brackets in brackets
        raise ValueError("an answer that is no JSON") from None
    if not isinstance(plain, dict) or not _is(plain.get("call"), int):
        raise ValueError("an answer without the number of its call")
    if plain["call"] != number:
        raise ValueError(f"an answer to call {plain['call']}, not {number}")
    if "scores" in plain and number:
        scores, logged = _list(plain["scores"], count), _list(plain.get("logged"))
        return Answer([_score(entry) for entry in scores], [_metric(entry) for entry in logged])
    if "ready" in plain and not number:
        wants, routes, built_in = _list(plain["ready"], 3)
        return Ready(
            [None if names is None else _names(names) for names in _list(wants, count)],
            [bool(flag) for flag in _list(routes, count)],
            [bool(flag) for flag in _list(built_in, count)],
        )
    if plain.get("begun") is True and number:
        return Begun()
    if "failed" in plain:
        return Failed(_text(plain["failed"], MAX_REASON))
    if "lost" in plain and number:
        reason, out_of_memory = _list(plain["lost"], 2)
        return Lost(_text(reason, MAX_REASON), out_of_memory=bool(out_of_memory))
    raise ValueError("an answer of no kind")


def printable(text: str) -> str:
    """Returns the text with every character that a terminal might obey, escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(error: BaseException) -> str:
    """Returns an exception as one printable line."""
    try:
        text = str(error)
    except BaseException:  # an exception of the user's may raise there, too
        text = ""
    text = printable(" ".join(text[: 4 * MAX_REASON].split()))
    name = printable(type(error).__name__)
    text = f"{name}: {text}" if text else name
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 3] + "..."


def _is(value: Any, *kinds: type) -> bool:
    """Whether a value is of one of these types; a bool is no number."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def _list(value: Any, count: int | None = None) -> Sequence[Any]:
    if not isinstance(value, list) or (count is not None and len(value) != count):
        raise ValueError(f"an answer without a list of {count or 'its'} values")
    return value


def _text(value: Any, most: int) -> str:
    if not isinstance(value, str):
        raise ValueError("an answer without its text")
    text = printable(value[: most + 1])
    return text if len(text) <= most else text[: most - 3] + "..."


def _names(value: Any) -> frozenset[str]:
    return frozenset(_text(name, MAX_NAME) for name in _list(value))


def _score(value: Any) -> Score:
    number, reason = _list(value, 2)
    if reason is not None:
        return Score(None, _text(reason, MAX_REASON))
    if number is None:
        return Score(None)
    # NaN is not below the bound either.
    if not _is(number, int, float) or not abs(number) <= LARGEST:
        raise ValueError("an answer with a reward that is no number")
    return Score(float(number))


def _metric(value: Any) -> tuple[str, float]:
    name, number = _list(value, 2)
    # NaN and infinity are what a function may find.
    if not _is(number, float) and not (_is(number, int) and abs(number) <= LARGEST):
        raise ValueError("an answer with a metric that is no number")
    return _text(name, MAX_NAME), float(number)

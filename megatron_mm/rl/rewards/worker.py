"""The processes that reward functions run in.

A worker is two processes. The keeper runs no function: it waits for the trainer's end or the
worker's, and then ends everything that a function started, wherever that has gone. The other one,
its child, reads calls from a pipe and writes scores back.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import pickle
import resource
import select
import signal
from collections.abc import Mapping, Set
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from megatron_mm.rl.rewards import family
from megatron_mm.rl.rewards.functions import RewardFunction
from megatron_mm.rl.rewards.messages import (
    LARGEST,
    Answer,
    Begun,
    Call,
    Failed,
    Lost,
    Ready,
    Score,
    body_of,
    one_line,
    read_body,
    write_body,
)

MAX_LOGGED = 10_000  # numbers of `log_metric` in one call


def work(pipe: Connection, lifeline: Connection, memory: int) -> None:
    """Answers calls until the trainer's process ends or closes the pipe. The first message tells
    the functions; the first answer is a Ready, or says why they cannot be loaded.

    Args:
        lifeline: its other end closes when the trainer ends, in whatever way.
        memory: bytes that this process and each of its children may allocate.
    """
    os.setsid()
    family.adopt_orphans()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # One thread each: there are many workers, and a thread's memory counts before it is used.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    keeper = os.getpid()
    child = os.fork()
    if child:
        pipe.close()
        _keep(child, lifeline)
    os.setsid()  # a function that signals its process group must not reach the keeper
    family.end_with(keeper)
    lifeline.close()
    _silence()
    family.limit_memory(memory)
    # The copy of this process that a function forks must not answer in its place.
    os.register_at_fork(after_in_child=pipe.close)
    with contextlib.suppress(EOFError, OSError):  # the trainer has closed the pipe
        _answer_calls(pipe)
    os._exit(0)  # no handler of a function's keeps it


def _keep(child: int, lifeline: Connection) -> NoReturn:
    """Waits until the child or the trainer ends, ends what is left, and ends as the child did."""
    watched = select.poll()
    watched.register(lifeline.fileno(), select.POLLHUP)
    watched.register(os.pidfd_open(child), select.POLLIN)
    status: int | None = None
    while status is None:
        # Every second for orphans that have ended and wait to be reaped.
        if any(fd == lifeline.fileno() for fd, _ in watched.poll(1000)):
            break
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                status = ended[1] if ended[0] == child else status
    family.end(os.getpid())
    if status is not None and os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(1 if status is None else os.waitstatus_to_exitcode(status) & 0xFF)


def _answer_calls(pipe: Connection) -> None:
    def tell(number: int, message: Any) -> None:
        write_body(pipe.fileno(), body_of(number, message))

    try:
        functions = [RewardFunction(spec) for spec in pickle.loads(read_body(pipe.fileno()))]
    except BaseException as error:
        tell(0, Failed(one_line(error)))
        return
    wants = [f.wants for f in functions], [f.wants_routes for f in functions]
    if any(wants[1]):
        import torch  # noqa: F401  # a call's routes are tensors; its limit is not for the import
    tell(0, Ready(*wants, [f.built_in for f in functions]))
    while True:
        call: Call = pickle.loads(read_body(pipe.fileno()))
        tell(call.number, Begun())
        tell(call.number, scores_of(functions[call.function], call))


def scores_of(function: RewardFunction, call: Call) -> Answer | Failed | Lost:
    """Returns one score for each sample, or the reason why the call has none; a Lost where memory
    ran out, or a completion was too much for a built-in function."""
    count = len(call.completions)
    logged: list[tuple[str, float]] = []

    def log_metric(name: str, value: float) -> None:
        if len(logged) < MAX_LOGGED:
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
            return Failed(f"returned a {type(values).__name__}, not a list of rewards")
        found = values if hasattr(values, "__len__") else [*itertools.islice(values, count + 1)]
        if len(found) != count:
            return Failed(f"returned {len(found)} rewards for {count} completions")
        return Answer([_score(value) for value in found], logged)
    except MemoryError as error:
        return Lost(one_line(error), out_of_memory=True)
    except (RecursionError, OverflowError) as error:
        return Lost(one_line(error)) if function.built_in else Failed(one_line(error))
    except BaseException as error:  # SystemExit too
        return Failed(one_line(error))


def _score(value: Any) -> Score:
    if value is None:
        return Score(None)
    try:
        if isinstance(value, (str, bytes, bytearray)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        return Score(None, f"returned a {type(value).__name__}, not a number")
    except OverflowError:
        number = math.inf
    # Rewards are added in fp32.
    return Score(number) if abs(number) <= LARGEST else Score(None, f"returned {number}")


def _silence() -> None:
    """Throws away what functions print: it may be megabytes for each call, from many ranks."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    os.close(nowhere)

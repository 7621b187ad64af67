"""Worker processes that read ahead of the trainer.

Each worker has its own pipe and answers its tasks in order. A thread of the trainer's process
receives the answers, so that workers continue while the trainer computes. Answers are sent as
bytes, not in shared memory, of which containers often have only 64 MB. A closed pipe tells each
side that the other has ended: workers exit when the trainer is gone, and the trainer notices a
killed worker at once.
"""

from __future__ import annotations

import atexit
import multiprocessing
import pickle
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_mm.cli import leave_stops_to_parent
from megatron_mm.errors import DataError

_pools: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


@atexit.register  # runs before multiprocessing's handler, which would wait for the workers
def _close_pools() -> None:
    for pool in list(_pools):
        pool.close()


class WorkerPool:
    """Pool of `size` processes that each build `make(*args)` and call its methods.

    The caller bounds the memory: answers are kept until `result` takes or `forget` drops them.
    """

    def __init__(self, size: int, make: Callable[..., Any], args: Sequence[Any]) -> None:
        # Spawned, because a fork would copy locks of the trainer's threads and its CUDA state.
        context = multiprocessing.get_context("spawn")
        # As bytes, which `_work` opens where an error (a tokenizer's file is gone) is told.
        recipe = pickle.dumps((make, tuple(args)), protocol=5)
        self._changed = threading.Condition()
        self._answers: dict[int, tuple[str, Any]] = {}
        self._next_ticket = 0
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        # Unanswered tasks of each worker: ticket and description.
        self._waiting: list[deque[tuple[int, str]]] = [deque() for _ in range(size)]
        self._forgotten: set[int] = set()
        _pools.add(self)
        try:
            for number in range(size):
                here, there = context.Pipe()
                process = context.Process(
                    target=_work,
                    args=(there, recipe),
                    name=f"data worker {number + 1}",
                    daemon=True,
                )
                process.start()
                there.close()
                self._processes.append(process)
                self._pipes.append(here)
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._take_in, name="data workers", daemon=True).start()

    def submit(self, method: str, argument: Any, description: str) -> int:
        """Has a worker call `method(argument)` and returns the ticket for `result`. `description`
        names the rows in an error message."""
        with self._changed:
            number = min(range(len(self._waiting)), key=lambda n: len(self._waiting[n]))
            ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
            self._waiting[number].append((ticket, description))
        try:
            self._pipes[number].send((ticket, method, argument))
        except OSError:
            self._bury(number)
        return ticket

    def result(self, ticket: int) -> Any:
        """Waits for an answer.

        Raises:
            DataError: the worker failed or died.
        """
        with self._changed:
            self._changed.wait_for(lambda: ticket in self._answers)
            status, value = self._answers.pop(ticket)
        if status == "failed":
            raise DataError(value)
        return value

    def forget(self, tickets: Sequence[int]) -> None:
        """Drops the answers of these tasks, also those still to come."""
        with self._changed:
            unanswered = {ticket for waiting in self._waiting for ticket, _ in waiting}
            for ticket in tickets:
                self._answers.pop(ticket, None)
            self._forgotten |= unanswered.intersection(tickets)

    def close(self) -> None:
        """Kills the workers."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        _pools.discard(self)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def _take_in(self) -> None:
        numbers = {pipe: number for number, pipe in enumerate(self._pipes)}
        while numbers:
            for pipe in wait(list(numbers)):
                assert isinstance(pipe, Connection)  # `wait` takes sockets as well
                try:
                    content = pipe.recv_bytes()
                except Exception:  # of any kind: this pipe is of no more use
                    number = numbers.pop(pipe)
                    self._processes[number].kill()
                    self._bury(number)
                    continue
                with self._changed:
                    ticket, at = self._waiting[numbers[pipe]].popleft()
                    try:
                        _, answer = pickle.loads(content)
                    except Exception as error:  # out of memory, for example; someone waits for it
                        answer = ("failed", f"{at}: {_one_line(error)}")
                    self._answer(ticket, answer)

    def _bury(self, number: int) -> None:
        """Fails all tasks of a dead worker. The first is the one it was working on."""
        process = self._processes[number]
        process.join(timeout=5)  # for its exit code
        code = process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        with self._changed:
            waiting = self._waiting[number]
            at = waiting[0][1] if waiting else "no row"
            while waiting:
                ticket, _ = waiting.popleft()
                self._answer(
                    ticket,
                    (
                        "failed",
                        f"{at}: the data worker that read this ended with {how}; lower "
                        "num_workers if memory ran out",
                    ),
                )

    def _answer(self, ticket: int, answer: tuple[str, Any]) -> None:
        if ticket in self._forgotten:
            self._forgotten.discard(ticket)
        else:
            self._answers[ticket] = answer
        self._changed.notify_all()


def _work(pipe: Connection, recipe: bytes) -> None:
    leave_stops_to_parent()
    worker, broken = None, None
    try:
        make, args = pickle.loads(recipe)
        worker = make(*args)
    except Exception as error:
        broken = _one_line(error)
    while True:
        try:
            ticket, method, argument = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            result = None if broken else getattr(worker, method)(argument)
            answer = ("failed", broken) if broken else ("done", result)
        except Exception as error:
            answer = ("failed", _one_line(error))
        try:
            pipe.send_bytes(pickle.dumps((ticket, answer), protocol=5))
        except OSError:
            return


def _one_line(error: Exception) -> str:
    reason = " ".join(str(error).split())
    known = isinstance(error, DataError)
    return reason if known else f"a data worker failed: {type(error).__name__}: {reason}"

"""The trainer's side of one reward worker: its start, its time limits, its end.

Nothing here waits for a worker longer than its limit: a call goes out, and an answer comes in, in
whatever pieces the pipe takes and gives.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import time
from collections.abc import Sequence
from typing import Any

from megatron_mm.plugins import Spec
from megatron_mm.rl.rewards import family
from megatron_mm.rl.rewards.messages import (
    HEAD,
    MAX_ANSWER,
    Begun,
    Call,
    Lost,
    Message,
    Ready,
    answer_of,
    framed,
)
from megatron_mm.rl.rewards.worker import work

START_SECONDS = 120.0  # for a worker to import the functions' modules; sympy alone takes 2 s
WATCH_SECONDS = 0.25  # between looks at a worker's memory
PIECE = 1 << 16


class RewardProcess:
    """One worker.

    Args:
        memory: bytes that each of its processes may allocate, and all of them together hold.

    Attributes:
        task: the task that it works on; None while it waits for one.
        ready: whether it has sent its first answer.
        begun: whether it has begun with its task. If not, the task is not why it is late.
        answered: how many calls it has answered.
    """

    def __init__(self, context: Any, specs: Sequence[Spec], memory: int) -> None:
        self.pipe, theirs = context.Pipe()
        # This end closes when this process ends, in whatever way; the keeper waits for it.
        their_lifeline, self.lifeline = context.Pipe(duplex=False)
        self.process = context.Process(
            target=work, args=(theirs, their_lifeline, memory), name="reward worker"
        )
        try:
            self.process.start()
        finally:
            theirs.close()
            their_lifeline.close()
        os.set_blocking(self.pipe.fileno(), False)
        self._memory, self._outgoing, self._incoming = memory, memoryview(b""), bytearray()
        # Processes that were there, and bytes that they held, when it was ready.
        self._family: list[int] = []
        self._held_first = 0
        self._call, self._count, self.answered = 0, len(specs), 0
        self.ready = self.begun = False
        self.task: Any = None
        self.since = self._next_look = time.monotonic()  # when its task was sent
        # Not as an argument of the process, which is written without a limit.
        self._outgoing = memoryview(framed(pickle.dumps([*specs])))
        self.set_limit(START_SECONDS)

    def set_limit(self, seconds: float) -> None:
        """Sets the time for its next answer, from now."""
        self.limit, self.deadline = seconds, time.monotonic() + seconds

    def send(self, task: Any, call: Call, seconds: float) -> None:
        """Gives it a call, which goes out while answers are awaited.

        Raises:
            Exception: of any kind, for a value that cannot be pickled; nothing was sent.
        """
        body = pickle.dumps(call._replace(number=self._call + 1))
        self._call, self._count = self._call + 1, len(call.completions)
        self.task, self.begun, self.since = task, False, time.monotonic()
        self._outgoing = memoryview(framed(body))
        self.set_limit(seconds)

    def events(self) -> int:
        """The events of its pipe that are waited for, as flags of `select.poll`."""
        return select.POLLIN | (select.POLLOUT if self._outgoing else 0)

    @property
    def is_full(self) -> bool:
        """Whether calls left so much behind that the next might find no memory: more than half of
        what was free when it was ready."""
        return self.held() - self._held_first > (self._memory - self._held_first) // 2

    def hear(self) -> Message | None:
        """Moves what the pipe can take and give, and returns the answer if it is complete; a Lost
        if there will be none. Does not wait."""
        closed = self._move()
        try:
            found = self._next()
        except ValueError as error:
            return Lost(f"the worker sent {error}")
        if isinstance(found, Begun):
            if self.begun:  # or it would never be late
                return Lost("the worker sent that it begins, twice")
            self.begun = True
            self.set_limit(self.limit)
            return self.hear()
        if found is not None:
            return self._entered(found)
        if closed:
            return Lost(f"the worker {self.how_it_ended()}")
        if time.monotonic() >= self.deadline:
            return Lost(f"took longer than {self.limit:g} s", timed_out=True)
        if time.monotonic() < self._next_look:
            return None
        self._next_look = time.monotonic() + WATCH_SECONDS
        held = self.held()
        if held <= self._memory:
            return None
        reason = f"held {held / 1e9:.1f} GB, {self._memory / 1e9:g} GB are allowed"
        return Lost(reason, out_of_memory=True)

    def held(self) -> int:
        """The bytes that its processes hold in memory."""
        if not self.process.is_alive():  # its number may be another's by now
            return 0
        return family.memory_of(family.descendants(self.process.pid), self._memory)

    def _entered(self, message: Message) -> Message:
        if isinstance(message, Ready):
            self._family, self._held_first = family.descendants(self.process.pid), self.held()
        elif self.ready and self.process.is_alive():
            # What a call started ends with it; helpers that were there before it stay.
            family.end(self.process.pid, self._family)
            self.answered += 1
        return message

    def _move(self) -> bool:
        """Writes and reads what can be; returns whether the other end is closed."""
        fd = self.pipe.fileno()
        try:
            while self._outgoing:
                self._outgoing = self._outgoing[os.write(fd, self._outgoing) :]
        except BlockingIOError:
            pass
        except OSError:  # closed; it may have said something before
            self._outgoing = memoryview(b"")
        try:
            while len(self._incoming) < HEAD + MAX_ANSWER:
                piece = os.read(fd, PIECE)
                if not piece:
                    return True
                self._incoming += piece
        except BlockingIOError:
            return False
        except OSError:
            return True
        return False

    def _next(self) -> Message | None:
        """Takes the next message out of what came in.

        Raises:
            ValueError: it is none.
        """
        if len(self._incoming) < HEAD:
            return None
        size = int.from_bytes(self._incoming[:HEAD], "little")
        if size > MAX_ANSWER:
            raise ValueError(f"an answer of {size} bytes, {MAX_ANSWER} are allowed")
        if len(self._incoming) < HEAD + size:
            return None
        body = bytes(self._incoming[HEAD : HEAD + size])
        del self._incoming[: HEAD + size]
        if self.task is None and self.ready:
            raise ValueError("an answer without a call")
        return answer_of(body, self._call, self._count)

    def kill(self) -> None:
        """Ends it, and whatever its functions started."""
        if self.process.is_alive():
            family.end(self.process.pid)
        self.lifeline.close()  # the keeper ends with what is left
        self.process.join(timeout=0.5)
        if self.process.is_alive():
            family.end(self.process.pid)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                self.process.kill()
            self.process.join(timeout=10)
        self.pipe.close()

    def how_it_ended(self) -> str:
        self.process.join(timeout=2)
        code = self.process.exitcode
        if code is None:
            return "closed its pipe"
        return f"ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"


def answers(workers: Sequence[RewardProcess]) -> list[tuple[RewardProcess, Message]]:
    """Returns the answers of workers, a Lost for one that died or ran out of time; waits until
    there is at least one."""
    found: list[tuple[RewardProcess, Message]] = []
    while workers and not found:
        waiting = select.poll()
        for worker in workers:
            waiting.register(worker.pipe.fileno(), worker.events())
        first = min(worker.deadline for worker in workers) - time.monotonic()
        waiting.poll(1000 * max(0.0, min(first, WATCH_SECONDS)))
        heard = [(worker, worker.hear()) for worker in workers]
        found = [(worker, message) for worker, message in heard if message is not None]
    return found

"""Signals that end a run in good order: after the present step it saves and leaves.

A second one ends the process at once, also where it waits for another rank inside a library: the
system writes each signal into a pipe, and a thread reads it there.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_mm.cli import STOPS

# Seconds in which several signals are one: a scheduler tells the agent and its ranks, and the agent
# tells the ranks again, once it is back from what it waits for. A keyboard tells once.
TOGETHER, TYPED = 5.0, 0.5


@contextmanager
def stopping(ask: Callable[[], None]) -> Iterator[None]:
    """Calls `ask` at the first signal inside the context, from a thread; at a second one the
    process ends with status 128 + its number. Signals that are ignored, as nohup has it, stay so.
    """
    ours = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Without a handler of Python's the system writes nothing.
    before = {number: signal.signal(number, _noted) for number in ours}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_listen, args=(reader, {*ours}, ask), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
        thread.join()
        os.close(reader)


def _noted(*_: object) -> None:
    """Does nothing: the thread has read it."""


def _listen(reader: int, ours: set[int], ask: Callable[[], None]) -> None:
    first: float | None = None
    while numbers := os.read(reader, 64):
        for number in numbers:
            if number not in ours:
                continue
            if first is None:
                first = time.monotonic()
                ask()
            elif time.monotonic() - first >= (TYPED if number == signal.SIGINT else TOGETHER):
                os._exit(128 + number)

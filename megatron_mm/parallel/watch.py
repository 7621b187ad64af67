"""Which rank has failed, or does not answer: signs of life in the job's store.

A rank that waits in a collective learns from its library that a connection has closed, or that time
is up, but not whose fault it is. So each rank has a thread that writes a number every second, and
where its program is; a rank that fails by an error leaves its last word. Each thread also watches
the next rank, and says when it has not heard of it for `SILENCE` seconds, long before the
collective's own time is up.

A frozen rank may be the one that holds the store. Asking it then takes for ever, so nobody but
threads that may be left behind asks.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_mm import cli

logger = logging.getLogger(__name__)

BEAT = 1.0  # seconds between signs of life
SILENCE = 30.0  # seconds without one, after which a rank is named
STORE_SECONDS = 10  # for the store to answer
HOLDER = "the store of the job, which rank 0 or its agent holds,"
LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|timed out|timeout|broken pipe|socket|gloo|nccl|"
    r"remote peer|peer (has )?(exited|closed)",
    re.IGNORECASE,
)
# NCCL says so of this rank's own GPU.
OWN = re.compile(r"cuda (error|failure)|unhandled cuda error|out of memory", re.IGNORECASE)
MOST = 160  # characters of what a library says
ENDED = re.compile(r"closed|reset|refused|broken|exited", re.IGNORECASE)


class Sign(NamedTuple):
    """A rank's last sign of life.

    Attributes:
        beat: how many signs it has given.
        waits: whether it waits for other ranks.
        place: where its program is.
        left: it gives up because of another rank.
        word: why it has failed; empty if it has not.
    """

    host: str
    beat: int
    waits: bool = False
    place: str = ""
    left: bool = False
    word: str = ""


def lost_connection(error: BaseException) -> str | None:
    """Returns in one line what a library says of a collective that failed because of another rank;
    None for any other error."""
    if not isinstance(error, RuntimeError):
        return None
    text = " ".join(str(error).split())
    lost = isinstance(error, dist.DistError) or LOST.search(text)
    if not lost or OWN.search(text):
        return None
    text = re.sub(r"^\[\S+\]\s*|Exception raised from.*", "", text)
    if len(text) <= MOST:
        return text
    return f"{text[: MOST // 3]} ... {text[MOST // 3 + 5 - MOST :]}"  # NCCL names the cause last


def guilty(before: Mapping[int, Sign], after: Mapping[int, Sign], closed: bool) -> str | None:
    """Names the rank because of which a collective failed; None if nothing points to one.

    Args:
        before, after: the signs of all other ranks, at least two beats apart.
        closed: whether a connection was closed; else a time has passed.
    """
    for rank, sign in after.items():
        if sign.word:
            return f"rank {rank} on {sign.host} failed: {sign.word}"
    silent = {
        rank: sign
        for rank, sign in after.items()
        if not sign.left and rank in before and before[rank].beat == sign.beat
    }
    for rank, sign in silent.items():
        what = "has ended without a word" if closed else "does not answer: it is frozen or gone"
        at = f" (it was at {sign.place})" if sign.place else ""
        return f"rank {rank} on {sign.host} {what}{at}"
    for rank, sign in after.items():
        if not sign.waits and not sign.left and sign.place:
            return f"rank {rank} on {sign.host} is not with the others, but at {sign.place}"
    return None


class Watch:
    """This rank's thread. Close it, or use it in a `with` statement.

    Args:
        store: of the job; only this object may use it.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int):
        self._store, self._rank, self._size = store, rank, world_size
        self._sign = Sign(socket.gethostname(), 0)
        self._main = threading.get_ident()
        self._lock, self._ending = threading.Lock(), threading.Event()
        self._heard = time.monotonic()  # when the store answered last
        self._give()  # before any collective, so that a rank that ends in one has given a sign
        self._threads = [
            threading.Thread(target=task, name=f"watch {task.__name__}", daemon=True)
            for task in (self._run, self._mind_the_store)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads."""
        self._ending.set()
        for thread in self._threads:
            thread.join(timeout=2 * BEAT)

    def last_word(self, text: str) -> None:
        """Tells the others why this rank fails."""
        _within(STORE_SECONDS, lambda: self._give(word=text))

    def why(self, said: str) -> str | None:
        """Describes a collective that failed because of another rank; None if all others live and
        nothing points to one of them. Takes two beats, or `STORE_SECONDS` more if the store does
        not answer.

        Args:
            said: what the library said; see `lost_connection`.
        """
        silent = f"{HOLDER} does not answer: its process is frozen or gone"
        answer = _within(STORE_SECONDS + 3 * BEAT, lambda: (self._guilty(said),))
        (found,) = answer or (silent,)
        return found and f"{found}; rank {self._rank} cannot go on without it ({said})"

    def _guilty(self, said: str) -> str | None:
        self._give(left=True)
        before = after = self._signs()
        found = guilty({}, before, True) if any(s.word for s in before.values()) else None
        if found is None:
            time.sleep(2.5 * BEAT)
            after = self._signs()
            found = guilty(before, after, bool(ENDED.search(said)))
        if not after:  # the store is gone, and who held it
            return "another rank has failed or does not answer"
        never = [rank for rank in range(self._size) if rank not in {*after, self._rank}]
        if found is None and never:
            return f"rank {never[0]} has given no sign of life"
        return found

    def _give(self, **changes: Any) -> None:
        with self._lock, contextlib.suppress(RuntimeError):  # the store may be gone
            self._sign = self._sign._replace(beat=self._sign.beat + 1, **changes)
            text = "\n".join(str(part).replace("\n", " ") for part in self._sign)
            self._store.set(f"sign/{self._rank}", text)

    def _signs(self) -> dict[int, Sign]:
        """Returns the last signs of the other ranks that have given one; none if the store is
        gone."""
        others = {rank: f"sign/{rank}" for rank in range(self._size) if rank != self._rank}
        with self._lock, contextlib.suppress(RuntimeError):
            if not self._store.check([*others.values()]):  # one question each only if one lacks
                others = {rank: key for rank, key in others.items() if self._store.check([key])}
            found = self._store.multi_get([*others.values()]) if others else []
            return {rank: _read(raw) for rank, raw in zip(others, found, strict=True)}
        return {}

    def _mind_the_store(self) -> None:
        """Says when the store has not answered for long, and when it does again."""
        told = False
        while not self._ending.wait(BEAT):
            silence = time.monotonic() - self._heard
            if told and silence < SILENCE:
                logger.warning("%s answers again", HOLDER[:-1], extra=cli.EVERY_RANK)
                told = False
            elif not told and silence > SILENCE:
                told = True
                logger.warning(
                    "%s has not answered for %d s: its process is frozen or gone",
                    *(HOLDER, silence),
                    extra=cli.EVERY_RANK,
                )

    def _run(self) -> None:
        other = (self._rank + 1) % self._size
        heard, since, told = -1, time.monotonic(), False
        while not self._ending.wait(BEAT):
            waits, place = _where(self._main)
            self._give(waits=waits, place=place)
            sign = self._sign_of(other)
            self._heard = time.monotonic()
            if sign is None or sign.word or sign.left:
                continue
            if sign.beat != heard:
                if told:
                    logger.warning(
                        "rank %d on %s answers again", other, sign.host, extra=cli.EVERY_RANK
                    )
                heard, since, told = sign.beat, time.monotonic(), False
            elif not told and time.monotonic() - since > SILENCE:
                told = True
                logger.warning(
                    "rank %d on %s has not answered for %d s: it is frozen or gone (it was at %s)",
                    other,
                    sign.host,
                    time.monotonic() - since,
                    sign.place or "its start",
                    extra=cli.EVERY_RANK,
                )

    def _sign_of(self, rank: int) -> Sign | None:
        with self._lock, contextlib.suppress(RuntimeError):
            if self._store.check([f"sign/{rank}"]):
                return _read(self._store.get(f"sign/{rank}"))
        return None


def _within[T](seconds: float, task: Callable[[], T]) -> T | None:
    """Returns what a task returns; None if that takes longer, and it is left behind."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(task()), daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _read(raw: bytes) -> Sign:
    host, beat, waits, place, left, word = raw.decode(errors="replace").split("\n")
    return Sign(host, int(beat), waits == "True", place, left == "True", word)


def _where(thread: int) -> tuple[bool, str]:
    """Returns (whether a thread waits for other ranks, the innermost line of this package that it
    is at)."""
    frame, waits = sys._current_frames().get(thread), False
    while frame is not None:
        path = frame.f_code.co_filename
        waits = waits or "torch/distributed" in path
        if f"megatron_mm{os.sep}" in path:
            short = path.rpartition(f"megatron_mm{os.sep}")[2]
            return waits, f"{short}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return waits, ""


def store_of_the_job() -> dist.Store:
    """Returns a connection of its own to the store of torchrun's agent, or of rank 0.

    Raises:
        RuntimeError: it cannot be reached.
    """
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=datetime.timedelta(seconds=STORE_SECONDS),
        wait_for_workers=False,
    )
    # Ranks that were started again must not read their predecessors' signs. tools/launch.py gives
    # every start a store of its own; torchrun alone keeps one. Counts of restarts differ between
    # nodes: a node that came back begins at 0.
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if shared else "0"
    return dist.PrefixStore(f"watch/{start}", store)

"""Which rank is named when a collective fails or a rank is silent."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from megatron_mm import cli
from megatron_mm.parallel import watch
from megatron_mm.parallel.watch import Sign, Watch, guilty, lost_connection

CLOSED = (
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer "
    "[127.0.0.1]:41234"
)

NO_MEMORY = (
    "NCCL error in: ProcessGroupNCCL.cpp:3699, unhandled cuda error (run with NCCL_DEBUG=INFO for "
    "details), NCCL version 2.28.9 ncclUnhandledCudaError: Call to CUDA function failed. Last "
    "error: Cuda failure 2 'out of memory'"
)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(CLOSED), True),
        (RuntimeError("[pair.cc:525] Read error [10.0.0.2]:3333: Connection reset by peer"), True),
        (RuntimeError("[unbound_buffer.cc:81] Timed out waiting 60000ms for recv operation"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (dist.DistBackendError("NCCL error: remote process exited or network error"), True),
        (dist.DistNetworkError("The client socket has timed out after 10000ms"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA error: the launch timed out and was terminated"), False),
        (dist.DistBackendError(NO_MEMORY), False),
        (ValueError("Connection closed by peer"), False),
        (ZeroDivisionError("division by zero"), False),
    ],
)
def test_errors_that_are_another_ranks(error, lost):
    said = lost_connection(error)
    assert (said is not None) == lost
    assert said is None or ("\n" not in said and len(said) <= 160)


def test_a_long_message_keeps_its_end():
    cause = "Last error: socketProgress: Connection closed by remote peer n7<41234>"
    long = dist.DistBackendError(f"NCCL error in: ProcessGroupNCCL.cpp:3699, {'x' * 300} {cause}")
    said = lost_connection(long)
    assert said.startswith("NCCL error in: ") and said.endswith(cause) and len(said) == 160


def signs(**changes: Sign) -> dict[int, Sign]:
    found = {rank: Sign(f"n{rank}", 7, True, "engine/feed.py:9 receive") for rank in (1, 2, 3)}
    return found | {int(rank[1:]): sign for rank, sign in changes.items()}


def moved(found: dict[int, Sign]) -> dict[int, Sign]:
    return {rank: sign._replace(beat=sign.beat + 2) for rank, sign in found.items()}


STILL = Sign("n2", 7, True, "engine/feed.py:9 receive")


@pytest.mark.parametrize(
    ("after", "closed", "expected"),
    [
        ({"r2": STILL._replace(word="ZeroDivisionError: x")}, True, "rank 2 on n2 failed: Zero"),
        ({"r2": STILL}, True, "rank 2 on n2 has ended without a word (it was at engine/feed.py"),
        ({"r2": STILL}, False, "rank 2 on n2 does not answer: it is frozen or gone (it was at"),
        ({"r2": STILL._replace(left=True)}, True, None),  # another victim, gone already
        ({"r3": STILL._replace(beat=9, waits=False, place="data/images.py:5 open")}, False,
         "rank 3 on n2 is not with the others, but at data/images.py:5 open"),
        ({}, False, None),
    ],
)  # fmt: skip
def test_who_is_named(after, closed, expected):
    before = signs()
    found = guilty(before, moved(before) | {int(r[1:]): s for r, s in after.items()}, closed)
    assert (found is None and expected is None) or found.startswith(expected)


@pytest.fixture
def said(capsys):
    cli.setup_logging(1)  # what every rank may say
    yield lambda: capsys.readouterr().err.splitlines()
    cli.logger.handlers = []
    cli.logger.propagate = True
    cli.logger.setLevel(logging.NOTSET)


class Frozen:
    """A sign of life that has stopped: its thread's, of a process that is frozen."""

    def __init__(self, store, rank: int):
        store.set(f"sign/{rank}", f"n{rank}\n5\nTrue\ntrain/loop.py:1 f\nFalse\n")


def test_a_silent_rank_is_named_once_and_when_it_is_back(monkeypatch, said):
    monkeypatch.setattr(watch, "BEAT", 0.02)
    monkeypatch.setattr(watch, "SILENCE", 0.2)
    store = dist.HashStore()
    Frozen(store, 1)
    with Watch(store, 0, 2):
        time.sleep(0.8)
        lines = said()
        assert len(lines) == 1, lines
        assert lines[0].startswith("warning: rank 1 on n1 has not answered for 0 s: it is frozen")
        store.set("sign/1", "n1\n6\nTrue\n\nFalse\n")
        time.sleep(0.15)
        assert said() == ["warning: rank 1 on n1 answers again"]


def test_ranks_that_live_are_not_named(monkeypatch, said):
    monkeypatch.setattr(watch, "BEAT", 0.02)
    monkeypatch.setattr(watch, "SILENCE", 0.3)
    store = dist.HashStore()
    with Watch(store, 0, 2), Watch(store, 1, 2):
        time.sleep(0.8)
    assert said() == []


def test_where_all_live_none_is_named(monkeypatch):
    """The rank's own traceback says more: its collective may have failed by itself."""
    monkeypatch.setattr(watch, "BEAT", 0.05)
    monkeypatch.setattr(watch, "_where", lambda _: (True, ""))  # all wait
    store = dist.HashStore()
    with Watch(store, 0, 2) as first, Watch(store, 1, 2):
        time.sleep(0.2)
        assert first.why("timed out") is None


@pytest.mark.parametrize("failed", ["by an error", "killed"])
def test_survivors_name_the_one_and_not_each_other(monkeypatch, failed):
    monkeypatch.setattr(watch, "BEAT", 0.05)
    store = dist.HashStore()
    watches = [Watch(store, rank, 3) for rank in range(3)]
    time.sleep(0.2)
    if failed == "by an error":
        watches[2].last_word("ZeroDivisionError: division by zero")
    watches[2].close()
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda r=rank: found.update({r: watches[r].why("closed by peer")}))
        for rank in (0, 1)
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    for each in watches[:2]:
        each.close()
    for rank, text in found.items():
        what = (
            "failed: ZeroDivisionError" if failed == "by an error" else "has ended without a word"
        )
        assert text.startswith("rank 2 on ") and what in text, text
        assert text.endswith(f"rank {rank} cannot go on without it (closed by peer)")


@pytest.mark.parametrize(
    ("signs", "expected"),
    [
        ((1, 2), "rank 1 on "),  # given before the first beat: a rank may end within a second
        ((2,), "rank 2 on "),  # the others' are read although one lacks
    ],
)
def test_a_rank_that_ends_before_its_first_beat_is_named(monkeypatch, signs, expected):
    store = dist.HashStore()
    monkeypatch.setattr(watch, "BEAT", 60.0)
    for rank in signs:
        Watch(store, rank, 3)._ending.set()
    monkeypatch.setattr(watch, "BEAT", 0.02)
    with Watch(store, 0, 3) as alone:
        assert alone.why("reset by peer").startswith(expected)


def test_a_rank_that_never_gave_a_sign_is_named(monkeypatch):
    monkeypatch.setattr(watch, "BEAT", 0.05)
    monkeypatch.setattr(watch, "_where", lambda _: (True, ""))  # all wait for it
    store = dist.HashStore()
    with Watch(store, 0, 3) as first, Watch(store, 2, 3):
        said = first.why("timed out")
    assert said == ("rank 1 has given no sign of life; rank 0 cannot go on without it (timed out)")


HOLDER = """
import datetime, sys, time
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder():
    """A process that holds a store, and a connection to it."""
    command = [sys.executable, "-c", HOLDER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            port = int(process.stdout.readline())
            yield process, dist.TCPStore("127.0.0.1", port, wait_for_workers=False)
        finally:
            process.kill()


@pytest.mark.launches
def test_a_frozen_store_is_named_and_holds_nobody_up(monkeypatch, said, holder):
    """Asking it would take for ever: TCPStore has no limit for an answer."""
    monkeypatch.setattr(watch, "BEAT", 0.05)
    monkeypatch.setattr(watch, "SILENCE", 0.5)
    monkeypatch.setattr(watch, "STORE_SECONDS", 1.0)
    process, store = holder
    with Watch(store, 1, 2) as watched:
        time.sleep(0.3)
        assert said() == []
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        (line,) = said()
        assert line.startswith(
            "warning: the store of the job, which rank 0 or its agent holds, has"
        )
        begin = time.monotonic()
        watched.last_word("a fault")
        text = watched.why("timed out")
        assert time.monotonic() - begin < 10
        assert text.startswith("the store of the job, which rank 0 or its agent holds, does not")
        assert text.endswith("rank 1 cannot go on without it (timed out)")
        process.send_signal(signal.SIGCONT)
        time.sleep(1.0)
        assert said() == [
            "warning: the store of the job, which rank 0 or its agent holds answers again"
        ]


def test_a_store_that_is_gone_ends_no_rank(monkeypatch):
    monkeypatch.setattr(watch, "BEAT", 0.02)

    class Gone:
        def __getattr__(self, name):
            def fail(*_):
                raise dist.DistNetworkError("the store's host is gone")

            return fail

    with Watch(Gone(), 0, 2) as alone:
        time.sleep(0.1)
        alone.last_word("something")
        assert alone.why("timed out").startswith("another rank has failed or does not answer")

"""Signals: the first asks to stop, a second ends at once, ignored ones stay ignored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_mm.cli import STOPS
from megatron_mm.train.stopping import TOGETHER, TYPED, stopping
from support.launches import ROOT

pytestmark = pytest.mark.kills

SCRIPT = """
import sys, threading, time
from megatron_mm.train.stopping import stopping

asked = []
with stopping(lambda: asked.append(time.monotonic())):
    print("ready", flush=True)
    if sys.argv[1] == "deaf":  # in a library that never returns to Python
        threading.Lock().acquire() or threading.Lock()
        lock = threading.Lock()
        lock.acquire()
        lock.acquire(timeout=60)
    until = time.monotonic() + 60
    while not asked and time.monotonic() < until:
        time.sleep(0.01)
    if sys.argv[1] == "saves":
        time.sleep(float(sys.argv[2]))
print("saved", flush=True)
"""


class Child:
    def __init__(self, how: str, *before: str, seconds: float = 3.0):
        command = [*before, sys.executable, "-c", SCRIPT, how, str(seconds)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"

    def end(self) -> tuple[str, int]:
        said, _ = self.process.communicate(timeout=30)
        return said, self.process.returncode


@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
def test_each_signal_asks_to_stop(number):
    child = Child("once")
    child.process.send_signal(number)
    assert child.end() == ("saved\n", 0)


@pytest.mark.parametrize("how", ["saves", "deaf"])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_second_one_ends_at_once(how, second):
    child = Child(how, seconds=TOGETHER + 3)
    child.process.send_signal(signal.SIGTERM)
    time.sleep(0.3 + (TYPED if second == signal.SIGINT else TOGETHER))
    began = time.monotonic()
    child.process.send_signal(second)
    assert child.end() == ("", 128 + second)
    assert time.monotonic() - began < 2


def test_signals_at_once_are_one():
    """A scheduler tells the agent and its ranks, and the agent tells the ranks again, seconds later
    if it was waiting for another host."""
    child = Child("saves")
    for pause in (0.02, 0.02, 1.5, 0.5):
        child.process.send_signal(signal.SIGTERM)
        time.sleep(pause)
    assert child.end() == ("saved\n", 0)


def test_nohup_stays_nohup():
    child = Child("once", "nohup")
    child.process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert child.process.poll() is None
    child.process.send_signal(signal.SIGTERM)
    assert child.end() == ("saved\n", 0)


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in STOPS]
    asked = []
    with stopping(lambda: asked.append("outer")):
        with stopping(lambda: asked.append("inner")):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.2)
    assert asked == ["inner", "outer"]
    assert [signal.getsignal(number) for number in STOPS] == before

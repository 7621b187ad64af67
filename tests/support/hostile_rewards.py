"""Reward functions that attack the trainer's side: its pipe, its memory, its process group."""

import ctypes
import json
import mmap
import os
import pickle
import re
import signal
import stat
import struct
import subprocess
import sys
import threading
import time

SLEEP = ["sleep", os.environ.get("SLEEP_SECONDS", "1000000")]
kept = []


class Runs:
    """Pickled, it creates a file where it is unpickled."""

    def __reduce__(self):
        return (open, (os.environ["HOSTILE_FILE"], "w"))


def pipes():
    """Returns the sockets of this process: the trainer's pipe is one of them."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                found.append(int(name))
        except OSError:
            pass
    return found


def say(*bodies, head="<q"):
    for fd in pipes():
        for body in bodies:
            os.write(fd, struct.pack(head, len(body)) + body)


def forged(**parts):
    """Writes an answer of its own to the calls that may be the present one."""
    say(*(json.dumps({"call": n} | parts).encode() for n in range(1, 4)))


def hold_the_interpreter():
    time.sleep(0.3)
    re.match(r"(a+)+$", "a" * 60 + "b")


def by_word(completions, **columns):
    return [_do(completion) for completion in completions]


def _do(word):
    if word == "pickled":  # in the frames of multiprocessing, and in ours
        say(pickle.dumps(Runs()), head="!i")
        say(pickle.dumps(Runs()))
    if word == "partial":
        for fd in pipes():
            os.write(fd, b"\x00\x00\x00")
        time.sleep(600)
    if word == "half a body":
        for fd in pipes():
            os.write(fd, struct.pack("<q", 1000) + b'{"call": 1')
        time.sleep(600)
    if word == "a huge length":
        for fd in pipes():
            os.write(fd, struct.pack("<q", 1 << 60))
        time.sleep(600)
    if word == "brackets":
        say(b"[" * 100_000)
        time.sleep(600)
    if word == "no json":
        say(b"\xff\xfe{{{")
        time.sleep(600)
    if word == "not a number":
        forged(scores=[["1", None]], logged=[])
        time.sleep(600)
    if word == "infinite":
        forged(scores=[[float("inf"), None]], logged=[])
        time.sleep(600)
    if word == "many digits":
        say(b'{"call": 1, "scores": [[' + b"9" * 5000 + b', null]], "logged": []}')
        time.sleep(600)
    if word == "two scores":
        forged(scores=[[1.0, None]] * 2, logged=[])
        time.sleep(600)
    if word == "ready":
        forged(ready=[[None], [False], [True]])
        time.sleep(600)
    if word == "begun for ever":
        while True:
            forged(begun=True)
            time.sleep(0.01)
    if word == "noise later":
        threading.Thread(target=lambda: (time.sleep(0.3), say(b"noise")), daemon=True).start()
    if word == "die later":
        threading.Thread(target=lambda: (time.sleep(0.3), os._exit(9)), daemon=True).start()
    if word == "close":
        os.closerange(3, 100)
        time.sleep(600)
    if word == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if word == "kill the group":
        os.killpg(0, signal.SIGKILL)
    if word == "abort":
        ctypes.CDLL(None).abort()
    if word == "endless":
        for fd in pipes():
            while True:
                os.write(fd, b"\x00" * 8 + b"x" * 1000)
    if word == "thread":
        threading.Thread(target=hold_the_interpreter, daemon=True).start()
    if word == "fork":
        os.fork()  # both go on
    if word == "child":
        subprocess.Popen(SLEEP)
    if word == "child elsewhere":
        subprocess.Popen(SLEEP, start_new_session=True)
    if word == "grandchild":
        spawn = f"import subprocess; subprocess.Popen({SLEEP!r}, start_new_session=True)"
        subprocess.run([sys.executable, "-c", spawn], check=True)
    if word == "child elsewhere, then hang":
        subprocess.Popen(SLEEP, start_new_session=True)
        time.sleep(600)
    if word == "child elsewhere, then die":
        subprocess.Popen(SLEEP, start_new_session=True)
        os._exit(7)
    if word == "allocate":
        kept.append(bytearray(3 << 30))
    if word == "share":
        kept.append(mmap.mmap(-1, 3 << 30))
        for place in range(0, 3 << 30, 4096):
            kept[-1][place] = 1
    if word == "children allocate":
        code = "import time; held = bytearray(b'x') * (900 << 20); time.sleep(600)"
        for _ in range(3):
            kept.append(subprocess.Popen([sys.executable, "-c", code]))
        kept[-1].wait()
    if word == "hoard":  # within the limit, and kept
        kept.append(bytearray(b"x") * (700 << 20))
    if word == "escape":
        raise ValueError("\x1b[2J\x1b]0;owned\x07\u202e")
    if word == "unprintable error":
        raise Unprintable
    if word == "log":
        return float("nan")
    return 1.0


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError


def unending(completions, **columns):
    """Returns rewards without end."""
    while True:
        yield 1.0


def logs_much(completions, log_metric, **columns):
    for number in range(50_000):
        log_metric("mine/" + "x" * 1000, number)
    log_metric("late", float("inf"))
    return [1.0] * len(completions)

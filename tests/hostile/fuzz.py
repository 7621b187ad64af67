"""Hostile inputs for every reader: `python -m tests.hostile.fuzz --minutes 10 [--reader NAME]`.

A reader is a module of tests/hostile/readers with
    NAME                what it reads
    make(rng, folder)   writes or returns one input, a pure function of the generator
    read(value)         what a run does with it
    ALLOWED             exceptions by which it may refuse an input

Inputs are read in a process of their own. Counted as findings: an exception of another kind, or a
message of several lines; an input that takes longer than LIMIT; a process that ends; a file written
outside the input's folder, a program started, a connection opened.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[2]
READERS = Path(__file__).parent / "readers"
LIMIT = 40.0  # seconds of an input, on a busy machine; an image may have 15 on the processor
START = 180.0  # and of a process's start, with its imports
MEMORY = 8 * 2**30
WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect", "os.startfile")
OWN_PROGRAMS = ("megatron_mm.pictures.serve",)


def names() -> list[str]:
    """The readers there are."""
    return sorted(path.stem for path in READERS.glob("*.py") if path.stem[0] != "_")


class Watch:
    """An audit hook that notes what reaches beyond a folder while one is set."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.noted: list[str] = []
        sys.addaudithook(self._hook)

    def _inside(self, path: Any) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return True  # a descriptor that is open already
        where = os.path.realpath(os.path.abspath(os.fsdecode(path)))
        return where.startswith((str(self.folder), "/dev/null")) or "/__pycache__" in where

    def _hook(self, event: str, args: tuple) -> None:
        if self.folder is None:
            return
        if event == "open":
            path, mode, flags = args
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not self._inside(path):
                self.noted.append(f"open {path!r}")
        elif event in WRITES:
            paths = [part for part in args if isinstance(part, (str, bytes))]
            if not all(map(self._inside, paths)):
                self.noted.append(f"{event} {paths!r}")
        elif event == "subprocess.Popen":
            command = " ".join(map(str, args[1]))
            if not any(name in command for name in OWN_PROGRAMS):
                self.noted.append(f"started {command[:200]}")
        elif event in STARTS:
            self.noted.append(f"{event} {str(args)[:200]}")


def work(name: str, seed: int, first: int, base: Path) -> None:
    """Reads the inputs `first` and after of a reader; writes a line before and after each."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    reader = importlib.import_module(f"tests.hostile.readers.{name}")
    watch = Watch()
    number = first
    print(json.dumps({"ready": True}), file=answers, flush=True)
    while sys.stdin.readline():
        folder = Path(tempfile.mkdtemp(dir=base))
        value = reader.make(Random(f"{seed}/{name}/{number}"), folder)
        watch.folder, watch.noted = os.path.realpath(folder), []
        said = {"number": number, "how": "accepted", "what": ""}
        try:
            reader.read(value)
        except reader.ALLOWED as error:
            said["how"] = "refused"
            if "\n" in str(error) or len(str(error)) > 4000:
                said |= {"how": "message", "what": f"{type(error).__name__}: {str(error)[:300]!r}"}
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)[-3:]
            at = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
            said |= {"how": "traceback", "what": f"{type(error).__name__}: {str(error)[:200]} {at}"}
        watch.folder = None
        if watch.noted:
            said |= {"how": "touched", "what": "; ".join(watch.noted[:3])}
        if said["how"] in ("accepted", "refused"):
            shutil.rmtree(folder, ignore_errors=True)
        else:
            said["what"] += f" [{folder}]"
        print(json.dumps(said), file=answers, flush=True)
        number += 1


class Worker:
    """The process that reads a reader's inputs; it begins again after one that ended it."""

    def __init__(self, name: str, seed: int, first: int, base: Path) -> None:
        self.name, self.next = name, first
        self._arguments, self._base = [name, str(seed)], base
        self._process: subprocess.Popen[bytes] | None = None

    def read(self) -> dict[str, Any]:
        """Has the next input read, and says how it went."""
        number, self.next = self.next, self.next + 1
        if self._process is None:
            self._start(number)
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
            line = self._line(LIMIT)
        except OSError:
            line = b""
        if line:
            return json.loads(line)
        how = "hang" if line is None else "ended"
        code = self.close()
        return {"number": number, "how": how, "what": f"{LIMIT:g} s, status {code}"}

    def _start(self, first: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.fuzz", "--work", *self._arguments, str(first)]
            + [str(self._base)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        )
        if not self._line(START):
            raise SystemExit(f"error: the reader {self.name} does not start")

    def _line(self, seconds: float) -> bytes | None:
        """One line of the process; none if it ended, None if it takes too long."""
        assert self._process is not None and self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return self._process.stdout.readline() if ready else None

    def close(self) -> int | None:
        """Ends the process and returns its status."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        time.sleep(0.05)
        code = process.poll()
        process.kill()
        process.communicate()
        return code


def fuzz(
    chosen: list[str], seed: int, seconds: float, first: int = 0, most: int | None = None
) -> tuple[dict[str, Counter[str]], list[str]]:
    """Reads inputs of the readers in turn, for `seconds` or until each has read `most`.

    Returns:
        how often each outcome came, by reader; a line for each finding.
    """
    base = Path(tempfile.mkdtemp(prefix="fuzz-"))
    workers = [Worker(name, seed, first, base) for name in chosen]
    counts: dict[str, Counter[str]] = {name: Counter() for name in chosen}
    findings: list[str] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        waiting = [w for w in workers if most is None or counts[w.name].total() < most]
        if not waiting:
            break
        worker = min(waiting, key=lambda w: counts[w.name]["milliseconds"])
        begin = time.monotonic()
        said = worker.read()
        counts[worker.name][said["how"]] += 1
        if most is None:  # each reader has the same share of the time
            counts[worker.name]["milliseconds"] += round(1000 * (time.monotonic() - begin))
        if said["how"] not in ("accepted", "refused"):
            again = f"--reader {worker.name} --seed {seed} --first {said['number']} --most 1"
            findings.append(f"{worker.name}: {said['how']}: {said['what']} ({again})")
    for worker in workers:
        worker.close()
    if not findings:
        shutil.rmtree(base, ignore_errors=True)
    return counts, findings


def main(argv: list[str]) -> int:
    """Returns the exit code: 1 if there is a finding."""
    if argv[:1] == ["--work"]:
        work(argv[1], int(argv[2]), int(argv[3]), Path(argv[4]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--reader", action="append", choices=names())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--most", type=int, help="inputs of each reader")
    given = parser.parse_args(argv)
    chosen = given.reader or names()
    counts, findings = fuzz(chosen, given.seed, 60 * given.minutes, given.first, given.most)
    for line in findings:
        print(line)
    kinds = ("accepted", "refused", "traceback", "message", "hang", "ended", "touched")
    print(f"{'reader':<16}{'inputs':>10}" + "".join(f"{kind:>11}" for kind in kinds))
    for name, found in counts.items():
        total = sum(found[kind] for kind in kinds)
        print(f"{name:<16}{total:>10}" + "".join(f"{found[kind]:>11}" for kind in kinds))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Check what only a GPU can tell, in order of value, within a few minutes.

    python tools/gpu_check.py --minutes 10 --out examples/benchmarks/h200.jsonl
    python tools/gpu_check.py --dry

One line for each check, and one row of JSON in FILE. A check that fails, hangs or ends CUDA costs
no other. The exit code is 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from megatron_mm import cli
from megatron_mm.benchmark.gpu.checks import CHECKS, Check
from megatron_mm.benchmark.gpu.visit import Row, Visit, tail
from megatron_mm.benchmark.gpu.worker import Pretend, compute_on_cpu, serve
from megatron_mm.errors import ConfigError, unknown
from megatron_mm.outputs import check_writable

PATIENCE = 3  # times a check's seconds, after which it counts as hung
START = 90  # seconds, after which a process on the GPU that has not begun counts as hung
# A batch system's, by which the two processes, each a job of its own, would join one.
OF_A_JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SPAWN = multiprocessing.get_context("spawn")  # a fork would share CUDA's state


def _parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything (default: 10)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these checks alone")
    parser.add_argument("--list", action="store_true", help="list the checks")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a row of JSON for each")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a fake GPU")
    return parser


def main(argv: list[str], pretend: Pretend = None) -> int:
    """Returns the exit code: 0; 1 if a check failed; 2 for wrong flags, or without a GPU.

    Args:
        pretend: for --dry; a function of a module, since other processes call it.
    """
    for name in OF_A_JOB:
        os.environ.pop(name, None)
    cli.setup_logging(0)
    begin = time.monotonic()
    try:
        args = _parser().parse_args(argv)
        chosen = _chosen(args.only)
        if args.dry and pretend is None:
            raise ConfigError("--dry needs what pretends a GPU; run tools/gpu_check.py")
        if args.list:
            for check in chosen:
                cli.say(f"{check.name:<12}{check.seconds:4.0f} s  {check.what}")
            return 0
        check_writable(args.out, "--out")
        return _visit(args, chosen, begin, pretend if args.dry else None)
    except ConfigError as error:
        return cli.fail(error)


def _chosen(names: list[str] | None) -> list[Check]:
    known = [check.name for check in CHECKS]
    for name in names or ():
        if name not in known:
            raise unknown("check", name, known)
    return [check for check in CHECKS if names is None or check.name in names]


def _visit(args: argparse.Namespace, checks: list[Check], begin: float, pretend: Pretend) -> int:
    deadline = begin + 60 * args.minutes
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder, _Output(args.out) as output:
        gpu = _GPU(Visit(Path(folder), args.dry), pretend)
        cpu = _on_cpu(checks if args.minutes > 0 else [], gpu.visit)
        try:
            for check in checks:
                left = deadline - time.monotonic()
                rows.append(gpu.run(check, left))
                output.add(rows[-1])
        finally:
            gpu.stop()
            if cpu is not None:
                cpu.kill()
    failed = [row.name for row in rows if row.status == "failed"]
    counts = {s: sum(row.status == s for row in rows) for s in ("ok", "failed", "skipped")}
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    cli.say(f"{said}; {time.monotonic() - begin:.0f} s")
    return int(bool(failed))


class _Output:
    """The file of rows; each is on disk when the next check begins."""

    def __init__(self, file: Path | None):
        self.file = file
        self._open: TextIO | None = None

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_) -> None:
        if self._open is not None:
            self._open.close()

    def add(self, row: Row) -> None:
        cli.say(row.line())
        if self.file is None:
            return
        if self._open is None:  # an earlier visit's rows stay until there is one
            self._open = self.file.open("w", encoding="utf-8")
        self._open.write(json.dumps(row.as_dict()) + "\n")
        self._open.flush()


def _on_cpu(checks: Iterable[Check], visit: Visit):
    """Starts the process for what the checks need from the CPU, and gives the visit an end of the
    pipe that tells whether it lives; None if they need nothing."""
    parts = list(dict.fromkeys(check.on_cpu for check in checks if check.on_cpu))
    if not parts:
        return None
    visit.helper, alive = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=compute_on_cpu, args=(parts, visit, alive))
    process.start()
    alive.close()
    return process


class _Lost(Exception):
    """The process on the GPU ended or hangs."""


class _GPU:
    """The process on the GPU; a new one where the last has ended."""

    def __init__(self, visit: Visit, pretend: Pretend):
        self.visit, self.pretend = visit, pretend
        self.log = visit.folder / "gpu.log"
        self.process: Any = None
        self.pipe: Any = None
        self.fresh = False  # it has run no check

    def run(self, check: Check, left: float) -> Row:
        """Runs a check, if there is time for it, and waits for its row.

        Raises:
            ConfigError: there is no GPU.
        """
        row, begin = Row(check.name), time.monotonic()
        needs = 0.0 if self.visit.dry else check.seconds
        if left <= needs:
            row.skipped = f"no time: it takes about {needs:.0f} s, {max(0.0, left):.0f} s are left"
            return row
        if check.alone and not self.fresh:
            self.stop()
        try:
            if self.process is None:
                self._start(self._limit(left, START))
                left -= time.monotonic() - begin
            self.fresh = False
            limit = self._limit(left, PATIENCE * check.seconds)
            row, usable = self._ask((check, limit), limit)
        except _Lost as lost:
            row.problems.append(str(lost))
            row.error, usable = tail(self.log), False
            row.seconds = time.monotonic() - begin
        if check.alone or not usable:
            self.stop()
        return row

    def _limit(self, left: float, seconds: float) -> float:
        """Seconds to wait; a fake GPU may take as long as it likes."""
        return left if self.visit.dry else min(left, seconds)

    def _start(self, limit: float) -> None:
        self.pipe, theirs = SPAWN.Pipe()
        arguments = (theirs, self.log, self.visit, self.pretend)
        self.process = SPAWN.Process(target=serve, args=arguments)
        self.process.start()
        theirs.close()
        self.fresh = True
        problem = self._ask(None, limit)
        if problem is not None:
            raise ConfigError(problem)

    def _ask(self, task: tuple[Check, float] | None, limit: float) -> Any:
        """Sends a task, if there is one, and returns the next answer."""
        try:
            if task is not None:
                self.pipe.send(task)
            if self.pipe.poll(limit):
                return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            raise _Lost(f"the process on the GPU ended with exit code {code}") from None
        if task is None:
            raise _Lost(f"the process on the GPU did not start within {limit:.0f} s")
        raise _Lost(f"no answer from the process on the GPU within {limit:.0f} s")

    def stop(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.process = self.pipe = None

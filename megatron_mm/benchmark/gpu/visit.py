"""Things that a check is given: where it runs, how long it may, where it writes its row."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from megatron_mm.parallel.groups import Groups


CPU_LOG = "cpu.log"  # in a visit's folder: what the process without GPU printed


class Skip(Exception):
    """Ends a check that cannot run here; its message says why."""


@dataclass
class Row:
    """The outcome of a check: a line on the console and a row of JSON.

    Attributes:
        text: what the line says of a check that passed.
        problems: what makes it fail.
        error: the traceback of an exception.
    """

    name: str
    text: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    skipped: str | None = None
    error: str | None = None
    seconds: float = 0.0

    @property
    def status(self) -> str:
        """`ok`, `failed` or `skipped`."""
        return "failed" if self.problems else "skipped" if self.skipped else "ok"

    def note(self, figures: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """Adds figures, by any names and by Python's."""
        self.figures |= {**(figures or {}), **more}

    def at_most(self, name: str, found: float, allowed: float) -> None:
        """Adds a figure, and a problem if it exceeds `allowed` or is no number."""
        finite = math.isfinite(found)
        self.figures[name] = float(f"{found:.4g}") if finite else str(found)
        if not (finite and found <= allowed):
            self.problems.append(f"{name} is {found:.3g}, allowed {allowed:.3g}")

    def line(self) -> str:
        """The row on the console."""
        said = {"failed": self.problems[:3], "skipped": [self.skipped or ""], "ok": self.text}
        text = "; ".join(" ".join(part.split()) for part in said[self.status])
        return f"{self.status:<8}{self.name:<12}{self.seconds:6.1f} s  {text}"

    def as_dict(self) -> dict[str, Any]:
        """The row of JSON."""
        found: dict[str, Any] = {"name": self.name, "status": self.status}
        if self.status == "skipped":
            found["why"] = self.skipped
        if self.problems:
            found["problems"] = self.problems
        if self.error:
            found["error"] = self.error
        return found | {"figures": self.figures, "seconds": round(self.seconds, 2)}


@dataclass
class Visit:
    """The process that checks run in, one after the other.

    Attributes:
        folder: for files of the visit.
        dry: whether the GPU is a fake one; sizes are then tiny.
        deadline: of the running check's waits, as `time.monotonic` counts.
        kept: things made by one check for later ones, by name.
        fake: the GPU that counts in place of a real one.
        helper: the end of a pipe whose other end the process without GPU holds while it lives;
            nothing is sent through it.
    """

    folder: Path
    dry: bool
    deadline: float = math.inf
    kept: dict[str, Any] = field(default_factory=dict)
    fake: Any = None
    helper: Connection | None = None

    def size[T](self, real: T, dry: T) -> T:
        """The first on a GPU, the second on a fake one."""
        return dry if self.dry else real

    @cached_property
    def groups(self) -> Groups:
        """A job of one rank."""
        from megatron_mm.config import ParallelConfig
        from megatron_mm.parallel import groups

        groups.start(ParallelConfig())
        return groups.build(ParallelConfig())

    @cached_property
    def device(self) -> torch.device:
        """The GPU."""
        from megatron_mm import platform

        return platform.device()

    def keep[T](self, name: str, make: Callable[[], T]) -> T:
        """Returns what was kept under a name, made if it is not there."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    def from_cpu(self, part: str) -> Mapping[str, Any]:
        """The result of a function that a process without GPU computes meanwhile; waits for it.

        Args:
            part: its path, as the check's registration names it.
        Raises:
            RuntimeError: it failed, took too long, or its process is gone.
        """
        import torch

        result, problem = cpu_files(self.folder, part)
        while True:
            # Before the files: what ends now has written its own.
            gone = self.helper is not None and self.helper.poll()
            if result.exists():
                break
            if problem.exists():
                text = problem.read_text(encoding="utf-8").strip()
                raise RuntimeError(f"on the CPU: {text.splitlines()[-1]}\n{text}")
            if gone:
                said = tail(self.folder / CPU_LOG) or "it printed nothing"
                raise RuntimeError(f"the process on the CPU ended without {part}\n{said}")
            if time.monotonic() > self.deadline:
                raise RuntimeError(f"{part} on the CPU did not end within the check's time")
            time.sleep(0.1)
        # A file of our own, a moment old.
        return torch.load(result, weights_only=False)


def tail(log: Path, lines: int = 30) -> str:
    """The last lines of a file; none if there is no file."""
    if not log.exists():
        return ""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def cpu_files(folder: Path, part: str) -> tuple[Path, Path]:
    """The files of a function that runs on the CPU: its result, its traceback."""
    return folder / f"{part}.pt", folder / f"{part}.error"

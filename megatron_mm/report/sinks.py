"""Views of a run that may fail: their disk may be full, their service gone, their terminal closed.

None of that costs the run a step. Each view fails by itself and says so once. A file goes on where
it stopped once there is room again: what could not be written waits in memory.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger(__name__)

RUN_ID_FILE = "wandb_run_id"
FINISH_SECONDS = 60.0  # for what W&B has not sent when the run ends; `wandb sync` sends the rest
MOST_WAITING = 1 << 26  # bytes that wait for room; a step takes about 2,000


class Appended:
    """A file that is only added to. A write that fails is no error: it is said once, and made up
    for by the next one that succeeds.

    Raises:
        OSError: at construction, if the file cannot be opened.
    """

    def __init__(self, path: Path):
        self._path, self._waiting, self._left_out = path, bytearray(), 0
        self._said = False
        self._fd: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, data: bytes) -> int:
        """Adds a whole record. What the system takes of it is on its way when this returns."""
        if len(self._waiting) + len(data) > MOST_WAITING:
            self._left_out += 1
        else:
            self._waiting += data
        self.flush()
        return len(data)

    def flush(self) -> None:
        """Writes what waits, as far as there is room."""
        try:
            while self._waiting and self._fd is not None:
                # A full disk takes a part of a record; the rest is added to it later.
                del self._waiting[: os.write(self._fd, self._waiting)]
        except OSError as error:
            if not self._said:
                logger.warning(
                    "%s cannot be written: %s; training goes on, what is missing follows if it can",
                    self._path,
                    reason(error),
                )
            self._said = True

    def close(self) -> None:
        """Tries once more, and says what is missing. May be called twice."""
        if self._fd is None:
            return
        self.flush()
        if self._waiting or self._left_out:
            logger.warning(
                "%s lacks its last %d bytes%s",
                self._path,
                len(self._waiting),
                f" and {self._left_out} records before them" if self._left_out else "",
            )
        fd, self._fd = self._fd, None
        try:
            os.close(fd)
        except OSError as error:  # a network's disk tells it only now
            logger.warning("%s may lack its end: %s", self._path, reason(error))


class Sink(Protocol):
    """One view of the metrics; any method may raise anything."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Guarded:
    """A view that is given up when it raises, and says why, once.

    Args:
        make: makes the view; it may fail as well.
        lasting: keep on trying, in silence, after it has failed.
    """

    def __init__(self, name: str, make: Callable[[], Sink], lasting: bool = False):
        self._name, self._lasting, self._said = name, lasting, False
        self._sink: Sink | None = None
        self._guard(lambda: setattr(self, "_sink", make()))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Shows the numbers of a step."""
        sink = self._sink
        if sink is not None:
            self._guard(lambda: sink.log(step, numbers))

    def close(self) -> None:
        """Ends the view. May be called twice."""
        sink, self._sink = self._sink, None
        if sink is not None:
            self._guard(sink.close)

    def _guard(self, do: Callable[[], object]) -> None:
        try:
            do()
        except Exception as error:  # of any kind: training goes on without this view
            if not self._said:
                logger.warning("no %s: %s; training goes on", self._name, reason(error))
            self._said = True
            if not self._lasting:
                self._sink = None


class TensorBoard:
    """TensorBoard's event file. Its own writer has a thread, whose errors arrive steps later."""

    def __init__(self, folder: Path, purge_step: int):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = event_pb2.Event
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = Appended(folder / f"{name}.{time.monotonic_ns()}")
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        # Hides the steps from this one on that an earlier attempt has written.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step=purge_step, session_log=start)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        from torch.utils.tensorboard.summary import scalar

        for name, value in numbers.items():
            self._add(step=step, summary=scalar(name, value))

    def close(self) -> None:
        self._file.close()

    def _add(self, **parts: Any) -> None:
        event = self._event(wall_time=time.time(), **parts)
        self._records.write(event.SerializeToString())


class WandB:
    """A run of Weights & Biases.

    Args:
        config: `LoggingConfig`.
        run_config: settings of the run, stored with it.
        directory: the run's; it keeps the id.
        goes_on: whether the run is resumed: then it goes on under its id, too. An offline run is
            another one each time, which `wandb sync --append` joins.
    """

    def __init__(self, config: Any, run_config: dict[str, Any], directory: Path, goes_on: bool):
        import wandb

        resumed: dict[str, Any] = {}
        if config.wandb_mode == "online" and "WANDB_RUN_ID" not in os.environ:
            resumed = {"id": _run_id(directory / RUN_ID_FILE, goes_on), "resume": "allow"}
        self._run = wandb.init(
            project=config.wandb_project,
            dir=str(directory),
            mode=config.wandb_mode,
            config=run_config,
            **resumed,
            # Quiet, without capturing the console or copying the code.
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                # It would wait for a service that is gone, and hold the job's GPUs, without end.
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        self._run.define_metric("*", step_metric="iteration")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        # Logged as a value, because W&B's own step counter rejects logging a step twice.
        self._run.log({**numbers, "iteration": step})

    def close(self) -> None:
        self._run.finish()


def _run_id(path: Path, goes_on: bool) -> str:
    """Returns the id in a file, or writes a new one."""
    if not goes_on or not path.exists():
        path.write_text(uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()


def reason(error: BaseException) -> str:
    """Returns the first line of what an exception says, or its type."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

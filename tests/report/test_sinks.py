"""Views that fail: each by itself, once said, and never at the cost of a step."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys

import pytest

from megatron_mm import cli
from megatron_mm.config.settings import LoggingConfig
from megatron_mm.report import sinks
from megatron_mm.report.metrics_log import MetricsLogger, read_metrics
from megatron_mm.report.sinks import Appended, Guarded

FULL = OSError(errno.ENOSPC, "No space left on device")


class Disk:
    """Stands for the system's write: takes `room` bytes of each file below `folder`, then is full.

    Attributes:
        room: bytes that are left.
    """

    def __init__(self, folder, monkeypatch, room: int):
        self.folder, self.room, self._write = str(folder), room, os.write
        monkeypatch.setattr(sinks.os, "write", self.write)

    def write(self, fd: int, data) -> int:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if not path.startswith(self.folder):
            return self._write(fd, data)
        if not self.room:
            raise FULL
        taken = self._write(fd, bytes(data)[: self.room])  # a full disk takes a part
        self.room -= taken
        return taken


@pytest.fixture
def said(capsys):
    cli.setup_logging(0)
    yield lambda: capsys.readouterr().err.splitlines()
    cli.logger.handlers = []
    cli.logger.propagate = True
    cli.logger.setLevel(logging.NOTSET)


def config(path, **changes) -> LoggingConfig:
    settings = {"tensorboard": True, "wandb_mode": "disabled", **changes}
    return LoggingConfig(output_dir=str(path), **settings)


def losses(path) -> list:
    return [r["train/lm_loss"] for r in read_metrics(path / "metrics.jsonl")]


def scalars(path) -> list:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tensorboard")).Reload()
    return [(e.step, e.value) for e in events.Scalars("train/lm_loss")]


@pytest.mark.parametrize("room", [0, 1, 37, 150, 1000])
def test_a_full_disk_costs_nothing_and_is_made_up_for(tmp_path, monkeypatch, said, room):
    """Whatever part of a record was taken: the rest follows when there is room."""
    with MetricsLogger(config(tmp_path), {}, 40, stream=io.StringIO()) as log:
        disk = Disk(tmp_path, monkeypatch, room)
        for step in range(1, 21):
            log.log(step, {"train/lm_loss": step / 4})
            log.table(step, [{"completion": "x" * 100}])
        disk.room = 1 << 30
        for step in range(21, 41):
            log.log(step, {"train/lm_loss": step / 4})
            log.table(step, [{"completion": "x" * 100}])
    lines = said()
    assert len(lines) == 3  # metrics, completions, TensorBoard: each once
    assert all("cannot be written: [Errno 28] No space left on device" in line for line in lines)
    assert losses(tmp_path) == [step / 4 for step in range(1, 41)]
    assert len(read_metrics(tmp_path / "completions.jsonl")) == 40
    assert scalars(tmp_path) == [(step, step / 4) for step in range(1, 41)]


def test_a_disk_that_stays_full_is_said_at_the_end(tmp_path, monkeypatch, said):
    with MetricsLogger(config(tmp_path), {}, 5, stream=io.StringIO()) as log:
        log.log(1, {"train/lm_loss": 1.0})
        Disk(tmp_path, monkeypatch, 10)
        for step in range(2, 6):
            log.log(step, {"train/lm_loss": 1.0})
    lines = said()
    assert len(lines) == 4 and sum(" lacks its last " in line for line in lines) == 2
    assert losses(tmp_path) == [1.0]  # a part of a line is no record


def test_what_waits_is_bounded(tmp_path, monkeypatch, said):
    monkeypatch.setattr(sinks, "MOST_WAITING", 100)
    file = Appended(tmp_path / "a")
    disk = Disk(tmp_path, monkeypatch, 0)
    for _ in range(10):
        file.write(b"x" * 29 + b"\n")
    disk.room = 1000
    file.close()
    file.close()
    assert (tmp_path / "a").read_bytes() == (b"x" * 29 + b"\n") * 3  # whole records
    assert "lacks its last 0 bytes and 7 records before them" in said()[-1]


class Breaks(io.StringIO):
    """A console whose terminal is gone, or whose file's disk is full."""

    def __init__(self, error: Exception, terminal: bool = False):
        super().__init__()
        self.error, self.terminal, self.tries = error, terminal, 0

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.tries += 1
        raise self.error


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "error", [FULL, BrokenPipeError(), OSError(errno.EIO, "I/O error"), ValueError("closed file")]
)
def test_a_console_that_is_gone(tmp_path, said, error, terminal):
    stream, quiet = Breaks(error, terminal), error.args[0:1] in ((errno.EIO,), ("closed file",))
    with MetricsLogger(config(tmp_path, tensorboard=False), {}, 9, stream=stream) as log:
        for step in range(1, 10):
            log.log(step, {"train/lm_loss": 1.0})
    assert losses(tmp_path) == [1.0] * 9
    # A bar gives up in silence when its terminal is gone.
    assert sum("no console: " in line for line in said()) == (0 if terminal and quiet else 1)


@pytest.mark.parametrize("moment", ["start", "log", "finish"])
def test_wandb_that_fails_at_any_moment(tmp_path, monkeypatch, said, moment):
    class Run:
        calls = 0

        def define_metric(self, *_, **__):
            pass

        def log(self, _):
            Run.calls += 1
            if moment == "log":
                raise RuntimeError("the service is gone\nwith a long story")

        def finish(self):
            if moment == "finish":
                raise FULL

    def init(**_):
        if moment == "start":
            raise OSError("no network")
        return Run()

    fake = type(sys)("wandb")
    fake.init, fake.Settings = init, dict
    monkeypatch.setitem(sys.modules, "wandb", fake)
    settings = config(tmp_path, tensorboard=False, wandb_mode="online")
    with MetricsLogger(settings, {}, 3, stream=io.StringIO()) as log:
        for step in range(1, 4):
            log.log(step, {"train/lm_loss": 1.0})
    lines = said()
    assert len(lines) == 1 and lines[0].startswith("warning: no W&B logging: ")
    assert lines[0].endswith("; training goes on") and "long story" not in lines[0]
    assert Run.calls == {"start": 0, "log": 1, "finish": 3}[moment]
    assert losses(tmp_path) == [1.0] * 3


def test_a_resumed_run_is_one_run_of_wandb(tmp_path, monkeypatch):
    """And another one begins anew; whoever sets WANDB_RUN_ID decides alone."""
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    begun = []

    class Run:
        define_metric = log = finish = lambda *_, **__: None

    def init(**given):
        begun.append((given.get("id"), given.get("resume"), given["settings"]))
        return Run()

    fake = type(sys)("wandb")
    fake.init, fake.Settings = init, dict
    monkeypatch.setitem(sys.modules, "wandb", fake)

    def start(step, mode="online"):
        settings = config(tmp_path, tensorboard=False, wandb_mode=mode)
        with MetricsLogger(settings, {}, 9, step, stream=io.StringIO()) as log:
            log.log(step + 1, {"train/lm_loss": 1.0})

    for step in (0, 1, 2, 0):
        start(step)
    ids, ways = zip(*[one[:2] for one in begun], strict=True)
    assert ids[0] == ids[1] == ids[2] != ids[3] and {*ways} == {"allow"}
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    start(1)
    monkeypatch.delenv("WANDB_RUN_ID")
    start(1, "offline")
    assert [one[:2] for one in begun[4:]] == [(None, None)] * 2
    # A service that is gone does not hold the GPUs of a run that has ended.
    for *_, settings in begun:
        assert 0 < settings["finish_timeout"] <= 60 and settings["finish_timeout_raises"]


def test_tensorboard_that_is_not_there(tmp_path, monkeypatch, said):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    with MetricsLogger(config(tmp_path), {}, 1, stream=io.StringIO()) as log:
        log.log(1, {"train/lm_loss": 1.0})
    assert [line.partition(":")[0] for line in said()] == ["warning"]
    assert losses(tmp_path) == [1.0]


def test_a_table_that_json_cannot_say(tmp_path, said):
    circle: list = []
    circle.append(circle)
    with MetricsLogger(config(tmp_path, tensorboard=False), {}, 1, stream=io.StringIO()) as log:
        log.table(1, [{"a": circle}])
        log.table(1, [{("a", 1): 2}])
        log.table(1, [{"a": 1}])
    assert read_metrics(tmp_path / "completions.jsonl") == [{"iteration": 1, "a": 1}]
    assert len(said()) == 2


def test_a_view_is_given_up_once(said):
    class Sink:
        calls = 0

        def log(self, step, numbers):
            Sink.calls += 1
            raise MemoryError

        def close(self):
            raise AssertionError("it was given up")

    view = Guarded("thing", Sink)
    view.log(1, {})
    view.log(2, {})
    view.close()
    assert Sink.calls == 1 and said() == ["warning: no thing: MemoryError; training goes on"]


@pytest.mark.parametrize("error", [FULL, BrokenPipeError(), ValueError("closed file")])
def test_messages_and_results_outlive_their_streams(monkeypatch, error):
    """A warning about a full disk goes to that disk, too."""
    cli.setup_logging(0)
    stream = Breaks(error)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    cli.logger.warning("something")
    cli.say("a table")
    assert stream.tries == 3  # the warning, the table, and the warning about the table

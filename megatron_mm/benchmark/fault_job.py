"""A run on two agents of this machine, seen from outside: its processes, and its steps as its
record tells them."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mm.config.flags import parse_early
from megatron_mm.errors import ConfigError, LaunchError
from megatron_mm.report.metrics_log import METRICS_FILE

NODE = Path(__file__).resolve().parents[2] / "examples" / "launch" / "node.sh"
PATIENCE = 300.0  # seconds for anything; a frozen rank is given up after a minute
LOOK = 0.02  # seconds between two looks at the record
STEP_TIME = "perf/iteration_time"


@dataclass(frozen=True)
class Step:
    """A step that was done.

    Attributes:
        seconds: that it took.
        stall: that its save took; None if it saved nothing.
        seen: when its record was seen, by `time.monotonic`.
    """

    iteration: int
    seconds: float
    stall: float | None
    seen: float


def split_config(flags: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the file of `--config FILE` or `--config=FILE`, and all other flags in their order.

    Raises:
        ConfigError: there is none.
    """
    config = parse_early(flags).config
    if config is None:
        raise ConfigError("faults need a run: --config FILE, and any flag of the trainer")
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--config")
    return config, parser.parse_known_args(list(flags))[1]


class FaultJob:
    """Two agents of one rank each, started at once; stop it in any case.

    Args:
        folder: for the run's output and the agents' logs.
        flags: of the trainer, `--config FILE` among them.
        restarts: how often the agents start their ranks again.

    Raises:
        ConfigError: no configuration is given.
    """

    def __init__(self, folder: Path, flags: Sequence[str], restarts: int):
        config, others = split_config(flags)
        folder.mkdir(parents=True, exist_ok=True)
        self.output, self._folder = folder / "out", folder
        self._record = _Record(self.output / METRICS_FILE)
        self._waiting: list[Step] = []
        self._last = 0
        output = ["--output-dir", str(self.output), "--wandb-mode", "disabled", "--no-tensorboard"]
        output += ["--valid-data", "none"]
        command = ["bash", str(NODE), config, *others, *output]
        kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        own = {
            **{"NNODES": "2", "NPROC_PER_NODE": "1", "SKIP_DOCTOR": "1"},
            **{"RDZV_ENDPOINT": f"127.0.0.1:{_free_port()}", "PYTHON": sys.executable},
            **{"MAX_RESTARTS": str(restarts)},
            **{"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        }
        self._agents: list[subprocess.Popen[bytes]] = []
        for number in (0, 1):
            address = {"NODE_ADDR": f"127.0.0.{number + 1}"}  # the first holds the rendezvous
            with (folder / f"node{number}.log").open("wb") as log:
                self._agents.append(
                    subprocess.Popen(
                        command, env=kept | own | address, stdout=log, stderr=log,
                        start_new_session=True,
                    )
                )  # fmt: skip

    def process(self, rank: int) -> int | None:
        """The process of a rank; None between two."""
        agent = self._agents[rank].pid
        try:
            children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        except OSError:
            return None
        return next((int(child) for child in children if _is_rank(child)), None)

    def signal(self, rank: int, number: int) -> int:
        """Sends a signal to a rank. Returns its process.

        Raises:
            LaunchError: it is not there.
        """
        process = self.process(rank)
        if process is None:
            raise LaunchError(f"rank {rank} does not run [{self._folder}]")
        os.kill(process, number)
        return process

    def said(self) -> str:
        """Everything that the agents and the ranks have said."""
        logs = [self._folder / f"node{number}.log" for number in (0, 1)]
        return "".join(log.read_text(errors="replace") for log in logs)

    def wait_for(self, what: Callable[[], bool], words: str) -> None:
        """Waits until something is so.

        Raises:
            LaunchError: it takes too long, or the job ends before.
        """
        end = time.monotonic() + PATIENCE
        while not what():
            ended = [agent.poll() for agent in self._agents]
            if time.monotonic() > end or any(code is not None for code in ended):
                lines = [line for line in self.said().splitlines() if "error:" in line]
                late = all(code is None for code in ended)
                why = f"{PATIENCE:.0f} s passed" if late else f"the agents ended with {ended}"
                raise LaunchError(
                    f"waiting for {words}, {why}; {lines[0] if lines else 'see'} [{self._folder}]"
                )
            time.sleep(LOOK)

    def steps_until(self, iteration: int) -> list[Step]:
        """Returns the steps that are done until this iteration; none if it is done already."""
        found: list[Step] = []
        while self._last < iteration:
            found.append(self._next(f"step {iteration}"))
        return found

    def steps_after_restart(self) -> list[Step]:
        """Returns the steps that are done until the first one of ranks that were started again, and
        that one."""
        epoch, found = self._record.epoch, [self._next("the first step after a fault")]
        while self._record.epoch == epoch:
            found.append(self._next("the first step after a fault"))
        return found

    def finish(self) -> None:
        """Waits until the run has ended by itself.

        Raises:
            LaunchError: it failed, or takes too long.
        """
        for agent in self._agents:
            try:
                code = agent.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                raise LaunchError(f"the run does not end [{self._folder}]") from None
            if code:
                raise LaunchError(f"the run ended with exit code {code} [{self._folder}]")

    def stop(self) -> None:
        """Ends whatever still runs."""
        for agent in self._agents:
            if agent.poll() is None:
                for rank in (0, 1):
                    if process := self.process(rank):
                        os.kill(process, signal.SIGCONT)
                agent.terminate()
        for agent in self._agents:
            try:
                agent.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(agent.pid, signal.SIGKILL)
                agent.wait()

    def _next(self, words: str) -> Step:
        if not self._waiting:

            def more() -> bool:
                self._waiting += self._record.new()
                return bool(self._waiting)

            self.wait_for(more, words)
        step = self._waiting.pop(0)
        self._last = step.iteration
        return step


class _Record:
    """The file of metrics, as it grows. Ranks that were started again replace it by its beginning,
    before their first step.

    Attributes:
        epoch: how often it was replaced.
    """

    def __init__(self, path: Path):
        self._path, self._file, self._read = path, -1, 0
        self.epoch = 0

    def new(self) -> list[Step]:
        """Returns the steps that were added since the last call."""
        try:
            with self._path.open("rb") as stream:
                number = os.fstat(stream.fileno()).st_ino
                replaced = number != self._file
                stream.seek(0 if replaced else self._read)
                text = stream.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        first = self._file < 0
        self._file, self._read = number, len(whole) + (0 if replaced else self._read)
        seen = time.monotonic()
        records = [json.loads(line) for line in whole.splitlines()]
        steps = [
            Step(r["iteration"], r[STEP_TIME], r.get("checkpoint/save_stall"), seen)
            for r in records
            if STEP_TIME in r
        ]
        if replaced and not first:
            self.epoch += 1
            return []
        return steps


def _is_rank(process: str) -> bool:
    """Whether a child of an agent is a rank that has not ended. A zombie has no environment."""
    try:
        return b"\0LOCAL_RANK=" in b"\0" + Path(f"/proc/{process}/environ").read_bytes()
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return tried.getsockname()[1]

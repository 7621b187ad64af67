"""Logs a run's metrics to a JSON Lines file, TensorBoard, Weights & Biases and the console. The
JSON Lines file is the record; the others are views of it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from megatron_mm.cli import printable, say
from megatron_mm.outputs import whole_file
from megatron_mm.report.backwards import from_the_end
from megatron_mm.report.sinks import Appended, Guarded, TensorBoard, WandB

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TABLE_FILE = "completions.jsonl"
RESULTS_FILE, EVALUATION_FILE, ANSWERS_FILE = "results.json", "evaluation.json", "answers.jsonl"
BEFORE_FILE = "experts_before.json"  # experts by skill when the run began
# What a finished run leaves, and the report of another one in its folder would show as its own.
OF_A_RUN = (RESULTS_FILE, EVALUATION_FILE, ANSWERS_FILE, BEFORE_FILE)
ROUTER_NORM = "moe/router_grad_norm/"  # followed by the layer number
# Shown on the console after the objective's own; the rest is in the file.
CONSOLE_KEYS = (
    "valid/lm_loss",
    "moe/load_balancing_loss",
    "train/grad_norm",
    "train/learning_rate",
)
WHEN_NOT_ZERO = ("train/skipped_samples", "train/held_back")


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the records of a metrics file; empty if there is none yet.

    An incomplete last line, which a killed writer leaves, is ignored.

    Raises:
        ValueError: another line is not JSON.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not a JSON object ({error.msg})") from None
    return records


def format_duration(seconds: float) -> str:
    """Formats seconds as 1:02:03, or 2:03 below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class MetricsLogger:
    """Logs a dictionary of numbers per step. Once it is made, nothing that goes wrong with it is an
    error; see `sinks`.

    Args:
        config: `LoggingConfig`.
        run_config: settings of the run, stored with the Weights & Biases run.
        start_step: last step already done, 0 in a new run. Later records of an earlier attempt are
            dropped, so that a resumed run has every step once.
        enabled: whether this rank writes.
        stream: console; default: stderr.
        console: names of metrics that the console shows first.

    Raises:
        OSError: the output directory cannot be written.
        ValueError: it holds files that are not records of a run.
    """

    def __init__(
        self,
        config: Any,
        run_config: dict[str, Any],
        total_steps: int,
        start_step: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        console: Sequence[str] = ("train/lm_loss",),
    ) -> None:
        self._files: dict[str, Appended] = {}
        self._views: list[Guarded] = []
        if not enabled:
            return
        directory = Path(config.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        goes_on = {}
        for name in (METRICS_FILE, TABLE_FILE):
            self._files[name], goes_on[name] = _open_record(directory / name, start_step)
        out = sys.stderr if stream is None else stream
        if config.tensorboard:
            folder, purge = directory / "tensorboard", start_step + 1
            self._views.append(Guarded("TensorBoard", lambda: TensorBoard(folder, purge)))
        if config.wandb_mode != "disabled":
            given = config, run_config, directory, goes_on[METRICS_FILE]
            self._views.append(Guarded("W&B logging", lambda: WandB(*given)))
        interval, keys = max(1, config.log_interval), (*console, *CONSOLE_KEYS)
        self._views.append(
            Guarded(
                "console",
                lambda: Console(out, keys, interval, start_step, total_steps),
                lasting=True,
            )
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Records metrics of a step. A step may be logged several times with different keys."""
        if not self._files:
            return
        numbers = {key: float(value) for key, value in metrics.items()}
        # JSON has no NaN or infinity; they become null.
        record = {key: _compact(value) for key, value in numbers.items()}
        self._files[METRICS_FILE].write(_line({"iteration": step, **record}))
        for view in self._views:
            view.log(step, numbers)

    def table(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Appends rows (completions and their rewards) to completions.jsonl. Values without a JSON
        form, such as dates, become text."""
        if not self._files or not rows:
            return
        try:
            lines = [_line({"iteration": step, **row}) for row in rows]
        except (TypeError, ValueError, RecursionError) as error:  # a key or a circle of a user's
            logger.warning("step %d's table was not written: %s", step, error)
            return
        self._files[TABLE_FILE].write(b"".join(lines))

    def close(self) -> None:
        """Closes the files and all views. May be called twice."""
        for file in self._files.values():
            file.close()
        for view in self._views:
            view.close()
        self._files, self._views = {}, []

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Console:
    """A line for each step, or a bar on a terminal."""

    def __init__(
        self, stream: TextIO, keys: Sequence[str], interval: int, start_step: int, total_steps: int
    ):
        self._stream, self._keys, self._interval = stream, keys, interval
        self._start_step, self._total_steps = start_step, total_steps
        self._started = time.monotonic()
        self._bar: Any = None
        if stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                unit="step",
                file=stream,
                dynamic_ncols=True,
            )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        shown = [f"{key} {numbers[key]:.4g}" for key in self._keys if key in numbers]
        shown += [f"{key} {numbers[key]:.0f}" for key in WHEN_NOT_ZERO if numbers.get(key)]
        shown += [f"{k} {v:.1%}" for k, v in sorted(numbers.items()) if k.startswith("accuracy/")]
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(printable(", ".join(shown[:3])))
            return
        evaluated = any(key.startswith("accuracy/") for key in numbers)
        if step % self._interval and step != self._total_steps and not evaluated:
            return
        elapsed = time.monotonic() - self._started
        left = elapsed / max(1, step - self._start_step) * (self._total_steps - step)
        text = " | ".join([f"step {step}/{self._total_steps}", *shown])
        say(f"{text} | left {format_duration(left)}", self._stream)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, default=str) + "\n").encode()


def _compact(value: float) -> float | int | None:
    """Converts whole numbers to int, and NaN and infinity to None."""
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _open_record(path: Path, start_step: int) -> tuple[Appended, bool]:
    """Drops the records after `start_step` and opens the file for appending. Returns also whether
    it holds earlier records of the run."""
    found, kept = False, 0
    for end, record in from_the_end(path):
        found = True
        if record["iteration"] <= start_step:
            kept = end
            break
    if found and not kept:  # of another run
        others = [path.with_name(name) for name in OF_A_RUN] if path.name == METRICS_FILE else []
        ending = _free_ending([path, *others])
        # The record last: a start that is killed in between finds it, and moves the rest.
        for one in (*(other for other in others if other.exists()), path):
            logger.info("%s of an earlier run is kept as %s%s", one, one.name, ending)
            one.replace(one.with_name(one.name + ending))
    elif path.exists() and (path.name == METRICS_FILE or kept < path.stat().st_size):
        # Replaced in one move: who follows the file finds another one, not a line cut in half, and
        # who follows the metrics learns of every start.
        with whole_file(path) as partial:
            shutil.copyfile(path, partial)
            os.truncate(partial, kept)
    return Appended(path), bool(kept)


def _free_ending(paths: Sequence[Path]) -> str:
    """Returns the first end of names that is free for all files: of a folder of several runs none
    is lost, and those of one run have one end."""
    ends = (f".previous{n}" for n in ("", *range(2, 10**6)))
    return next(e for e in ends if not any(p.with_name(p.name + e).exists() for p in paths))

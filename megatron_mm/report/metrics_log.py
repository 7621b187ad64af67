"""Logs a run's metrics to a JSON Lines file, TensorBoard, Weights & Biases and the console. The
JSON Lines file is the record; the others are views of it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from megatron_mm.cli import printable, say

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TABLE_FILE = "completions.jsonl"
ROUTER_NORM = "moe/router_grad_norm/"  # followed by the layer number
# Shown on the console after the objective's own; the rest is in the file.
CONSOLE_KEYS = ("moe/load_balancing_loss", "train/grad_norm", "train/learning_rate")
WHEN_NOT_ZERO = ("train/skipped_samples",)


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
    """Logs a dictionary of numbers per step.

    Args:
        config: `LoggingConfig`.
        run_config: settings of the run, stored with the Weights & Biases run.
        start_step: last step already done, 0 in a new run. Later records of an earlier attempt are
            dropped, so that a resumed run has every step once.
        enabled: whether this rank writes.
        stream: console; default: stderr.
        console: names of metrics that the console shows first.

    Raises:
        ValueError: the output directory holds files that are not records of a run.
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
        self.enabled = enabled
        self._shown = (*console, *CONSOLE_KEYS)
        self._file: TextIO | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._bar: Any = None
        if not enabled:
            return
        self._stream = sys.stderr if stream is None else stream
        self._interval = max(1, config.log_interval)
        self._start_step, self._total_steps = start_step, total_steps
        self._started = time.monotonic()
        directory = Path(config.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        self._file = _open_record(directory / METRICS_FILE, start_step)
        self._table = directory / TABLE_FILE
        _open_record(self._table, start_step).close()
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides steps of an earlier attempt after the step to resume from.
            self._tensorboard = SummaryWriter(
                str(directory / "tensorboard"), purge_step=start_step + 1
            )
        if config.wandb_mode != "disabled":
            self._wandb = self._start_wandb(config, run_config, directory)
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
            )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Records metrics of a step. A step may be logged several times with different keys."""
        if not self.enabled or self._file is None:
            return
        numbers = {key: float(value) for key, value in metrics.items()}
        # JSON has no NaN or infinity; they become null.
        record = {key: _compact(value) for key, value in numbers.items()}
        try:
            self._file.write(json.dumps({"iteration": step, **record}) + "\n")
            self._file.flush()
        except OSError as error:  # a full disk must not end the run
            logger.warning("step %d was not recorded: %s", step, error)
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            # Logged as a value, because W&B's own step counter rejects logging a step twice.
            self._wandb.log({**numbers, "iteration": step})
        self._show(step, numbers)

    def table(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Appends rows (completions and their rewards) to completions.jsonl. Values without a JSON
        form, such as dates, become text."""
        if not self.enabled or not rows:
            return
        try:
            with self._table.open("a", encoding="utf-8") as file:
                file.writelines(
                    json.dumps({"iteration": step, **row}, default=str) + "\n" for row in rows
                )
        except OSError as error:
            logger.warning("step %d's table was not written: %s", step, error)

    def close(self) -> None:
        """Closes all views. May be called twice."""
        if self._bar is not None:
            self._bar.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._file is not None:
            self._file.close()
        self._bar = self._tensorboard = self._wandb = self._file = None

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start_wandb(self, config: Any, run_config: dict[str, Any], directory: Path) -> Any:
        try:
            import wandb

            run = wandb.init(
                project=config.wandb_project,
                dir=str(directory),
                mode=config.wandb_mode,
                config=run_config,
                # Quiet, without capturing the console or copying the code.
                settings=wandb.Settings(
                    silent=True, console="off", disable_code=True, disable_git=True
                ),
            )
            run.define_metric("*", step_metric="iteration")
        except Exception as error:  # of any kind: training goes on without this view
            reason = str(error).strip() or type(error).__name__
            logger.warning("no W&B logging: %s", reason.splitlines()[0])
            return None
        return run

    def _show(self, step: int, numbers: dict[str, float]) -> None:
        shown = [f"{key} {numbers[key]:.4g}" for key in self._shown if key in numbers]
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


def _compact(value: float) -> float | int | None:
    """Converts whole numbers to int, and NaN and infinity to None."""
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _open_record(path: Path, start_step: int) -> TextIO:
    """Drops the records after `start_step` and opens the file for appending."""
    found = read_metrics(path)
    if not all(isinstance(record, dict) and "iteration" in record for record in found):
        raise ValueError(f"{path}: not a record of a run; use another output_dir")
    kept = [record for record in found if record["iteration"] <= start_step]
    if found and not kept:  # of another run: kept under another name
        path.replace(path.with_name(path.name + ".previous"))
    # Replaced in one move, so that a crash here does not lose the record.
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
    partial.replace(path)
    return path.open("a", encoding="utf-8")

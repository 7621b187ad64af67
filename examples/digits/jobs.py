"""Jobs of a comparison: commands that make files, run side by side and not repeated."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "examples" / "digits"


@dataclass(frozen=True)
class Job:
    """A command and the file that says it is done.

    Attributes:
        done: it exists once the job is done.
        command: of Python: a script or -m and a module, with its arguments.
        log: the command's output.
        needs: files that other jobs make.
        late: more arguments, known only once the needs are there.
        moves: (from, to) of what the command has made, in this order; `done` last. A command that
            writes `done` itself, at its end, needs none.

    What made `done` is written beside the log, so that a folder is not finished by other jobs than
    those that began it.
    """

    done: Path
    command: tuple[str, ...]
    log: Path
    needs: tuple[Path, ...] = ()
    late: Callable[[], Sequence[str]] = tuple
    moves: tuple[tuple[Path, Path], ...] = ()

    @property
    def _maker(self) -> Path:
        return self.log.with_suffix(".made-by")

    def _words(self) -> str:
        return "\n".join(self.command).replace(str(ROOT), ".") + "\n"

    def made_otherwise(self) -> bool:
        """Whether another command has made `done`."""
        made = self.done.exists() and self._maker.exists()
        return made and self._maker.read_text() != self._words()

    def run(self) -> str | None:
        """Runs the command, with its output in the log. Returns one line if it failed."""
        for source, _ in self.moves:
            if source.is_dir():  # half made
                shutil.rmtree(source)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with self.log.open("w") as file:
            command = [sys.executable, *self.command, *self.late()]
            code = subprocess.run(
                command, stdout=file, stderr=file, env=environment, cwd=ROOT
            ).returncode
        if code == 0:
            self._maker.write_text(self._words())
            for source, target in self.moves:
                source.rename(target)
            if self.done.exists():
                return None
        lines = self.log.read_text().splitlines()
        said = f"status {code}, {self.done.name} was not made"
        return f"{self.log}: {next((one for one in lines if one.startswith('error:')), said)}"


def run_all(jobs: Sequence[Job], side_by_side: int) -> list[str]:
    """Runs the jobs that are not done: always the first whose needs are there. A failed job stops
    only those that need it. Returns a line for each that failed, and one for those that need it.
    Nothing is run where another command has made what is done."""
    others = [f"{job.done} was made by another command" for job in jobs if job.made_otherwise()]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        return [f"{others[0]}{more}; give another --out, or the flags that it was begun with"]
    waiting = [job for job in jobs if not job.done.exists()]
    failed: list[str] = []
    running: set[Path] = set()
    change = threading.Condition()

    def work() -> None:
        while True:
            with change:
                while (job := _first(waiting)) is None:
                    if not waiting or not running:
                        return
                    change.wait()
                waiting.remove(job)
                running.add(job.done)
            began = time.monotonic()
            print(f"{job.done}: begins", flush=True)
            problem = None
            try:
                problem = job.run()
            except OSError as error:
                problem = f"{job.done}: {error}"
            minutes = (time.monotonic() - began) / 60
            with change:
                running.discard(job.done)
                if problem:
                    failed.append(problem)
                change.notify_all()
            print(problem or f"{job.done}: done in {minutes:.1f} minutes", flush=True)

    threads = [threading.Thread(target=work) for _ in range(side_by_side)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:  # the commands got it too
        with change:
            waiting.clear()
        for thread in threads:
            thread.join()
        raise
    if waiting:
        lacking = next(path for path in waiting[0].needs if not path.exists())
        failed.append(f"{len(waiting)} not begun; {waiting[0].done} needs {lacking}, for example")
    return failed


def _first(waiting: Sequence[Job]) -> Job | None:
    return next((job for job in waiting if all(path.exists() for path in job.needs)), None)


# The demo's steps as one microbatch: a rank without a pipeline has none to fill, and takes a
# quarter less processor time.
AT_ONCE = ("--micro-batch-size", "32")


def one_stage(layers: str | None = None) -> list[str]:
    """Returns flags for layers without pipeline stages: the demo's, or those of a pattern."""
    one = ["--pipeline-model-parallel-size", "1", "--pipeline-model-parallel-layout"]
    if layers is not None:
        return [*one, layers, "--hybrid-layer-pattern", layers]
    layout = yaml.safe_load((DIGITS / "demo.yaml").read_text())["parallel"]
    return [*one, layout["pipeline_model_parallel_layout"].replace("|", "").replace(" ", "")]


def training(
    config: Path,
    folder: Path,
    flags: Sequence[str],
    needs: Sequence[Path],
    minutes: Callable[[], float] | None = None,
    layers: str | None = None,
    late: Callable[[], Sequence[str]] = tuple,
    saves: int | None = None,
) -> Job:
    """A training on one rank, because so small a model is no faster on two. It ends with the
    answers to all questions. If it was stopped, it goes on from its own checkpoint.

    Args:
        minutes: after which the training ends; such a run begins anew if it was stopped.
        layers: the pattern of its model; default the demo's.
        late: more flags, known only once the needs are there.
        saves: steps between checkpoints, which are all kept; None: only the last one is.
    """
    again: tuple[str, ...] = ("--save-interval", str(saves or 200), "--resume")
    again += () if saves else ("--keep-last-checkpoints", "1")

    def limit() -> Sequence[str]:
        ending = ("--exit-duration-in-mins", f"{minutes():.4f}") if minutes else again
        return (*ending, *late())

    return Job(
        folder / "answers.jsonl",
        (
            *("-m", "megatron_mm.train", "--config", str(config), "--output-dir", str(folder)),
            *("--save", str(folder / "checkpoint"), "--wandb-mode", "disabled", "--no-report"),
            *one_stage(layers),
            *flags,
        ),
        folder / "train.log",
        tuple(needs),
        limit,
    )


def discovery(
    checkpoint: Path, data: Path, out: Path, flags: Sequence[str], needs: Sequence[Path]
) -> Job:
    """A run of tools/discover_experts.py on the rows of `data`/mix.jsonl."""
    part = out.with_name(f"part_{out.name}")
    return Job(
        out,
        (
            *(str(ROOT / "tools" / "discover_experts.py"), "--checkpoint", str(checkpoint)),
            *("--data", str(data / "mix.jsonl"), "--out", str(part)),
            *flags,
        ),
        out.with_suffix(".log"),
        tuple(needs),
        moves=tuple((part.with_suffix(end), out.with_suffix(end)) for end in (".png", ".json")),
    )


def digits_data(folder: Path, flags: Sequence[str]) -> Job:
    """A run of tools/make_digits.py. `done` is the tokenizer, which is made last."""
    part = folder.with_name(f"part_{folder.name}")
    tool = str(ROOT / "tools" / "make_digits.py")
    return Job(
        folder / "tokenizer.model",
        (tool, "--out", str(part), "--jitter", "1", *flags),
        folder.with_suffix(".log"),
        moves=((part, folder),),
    )

"""The names of checkpoints: how one appears at once, and how it is found again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from megatron_mm.checkpoint import storage
from megatron_mm.checkpoint.errors import CheckpointError

FORMAT = 1
LATEST, RUN, PARTIAL = "latest", "run.json", ".partial"


def publish(partial: Path, final: Path) -> None:
    """Rename a finished checkpoint into place, then point `latest` to it. One rank calls it."""
    folder = final.parent
    replaced = final.with_name(f"{final.name}.replaced{PARTIAL}")
    if replaced.exists():
        shutil.rmtree(replaced)
    if final.exists():  # the same iteration again: an earlier run, or a resumed one
        final.rename(replaced)
    partial.rename(final)
    storage.sync_folder(folder)
    pointer = folder / f"{LATEST}{PARTIAL}"
    with pointer.open("w", encoding="utf-8") as stream:
        stream.write(final.name + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    pointer.replace(folder / LATEST)
    storage.sync_folder(folder)
    if replaced.exists():
        shutil.rmtree(replaced)


def resolve(folder: Path) -> tuple[Path, dict]:
    """(checkpoint folder, its run.json). Raises CheckpointError unless both are complete."""
    path = folder
    if not folder.is_dir():
        raise CheckpointError("there is no such folder")
    if (folder / LATEST).is_file():
        path = folder / (folder / LATEST).read_text(encoding="utf-8").strip()
        if not path.is_dir():
            raise CheckpointError(f"{LATEST} names {path.name}, which is not there")
    if path.name.endswith(PARTIAL):
        raise CheckpointError("it is the rest of a save that never finished")
    if not (path / RUN).is_file():
        raise CheckpointError(f"it has neither {LATEST} nor {RUN}: not a complete checkpoint")
    try:
        run = json.loads((path / RUN).read_text(encoding="utf-8"))
        needed = {"format", "iteration", "layout", "adam_step", "scheduler", "loader", "config"}
        absent = sorted(needed - run.keys()) + (["config.model"] * ("model" not in run["config"]))
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path / RUN} is damaged: {error}") from error
    if absent:
        raise CheckpointError(f"{path / RUN} has no {absent[0]}")
    if run["format"] != FORMAT:
        raise CheckpointError(f"{path / RUN} has format {run['format']}; this version: {FORMAT}")
    return path, run

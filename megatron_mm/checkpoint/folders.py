"""The names of checkpoints: how one appears at once, how it is found again, how it goes.

`iter_0000120` is complete whenever it exists. Three suffixes say that a folder is not a
checkpoint by that name: it is being written, was moved aside by a newer save of the same
iteration, or is being deleted. A process may be killed between any two lines here.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from megatron_mm.checkpoint import sealed
from megatron_mm.errors import CheckpointError

FORMAT = 2
LATEST, RUN = "latest", "run.json"
PARTIAL, REPLACED, DELETED = ".partial", ".replaced", ".deleted"
NAME = re.compile(r"iter_\d{7,}")


def name_of(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def with_suffix(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def publish(partial: Path, final: Path) -> None:
    """Rename a finished checkpoint into place, then point `latest` to it. One rank calls it."""
    folder, replaced = final.parent, with_suffix(final, REPLACED)
    if final.exists():  # the same iteration again: an earlier run, or a resumed one
        final.rename(replaced)
    partial.rename(final)
    sealed.sync_folder(folder)
    pointer = folder / f"{LATEST}{PARTIAL}"
    sealed.write_bytes(pointer, f"{final.name}\n".encode())
    pointer.replace(folder / LATEST)
    sealed.sync_folder(folder)
    if replaced.exists():
        shutil.rmtree(replaced)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed or failed saves and deletions left. One rank calls it.

    A checkpoint that was moved aside while its successor never came gets its name back.
    """
    (folder / f"{LATEST}{PARTIAL}").unlink(missing_ok=True)
    for path in sorted(folder.iterdir()):
        final = path.with_suffix("")
        if not NAME.fullmatch(final.name) or path.is_symlink() or not path.is_dir():
            continue
        if path.suffix == REPLACED and not final.exists():
            path.rename(final)
        elif path.suffix in (PARTIAL, REPLACED, DELETED):
            shutil.rmtree(path)


def prune(folder: Path, keep: int, newest: int) -> None:
    """Delete checkpoints of this folder until `keep` are left. One rank calls it.

    Counted are those up to iteration `newest`, which was just published: later ones belong to
    a run that went further before this one was resumed. What `latest` names stays in any case.
    A folder is renamed before anything in it is deleted, so half of one is never picked.
    """
    latest = (folder / LATEST).read_text(encoding="utf-8").strip()
    found = {_iteration(path): path for path in folder.iterdir()}
    ours = sorted(iteration for iteration in found if iteration is not None)
    for iteration in [i for i in ours if i <= newest][:-keep]:
        if found[iteration].name == latest:
            continue
        deleted = found[iteration].rename(with_suffix(found[iteration], DELETED))
        sealed.sync_folder(folder)
        shutil.rmtree(deleted)


def _iteration(path: Path) -> int | None:
    """Of a checkpoint of ours that can be read; None for anything else."""
    if not NAME.fullmatch(path.name) or path.is_symlink() or not (path / RUN).is_file():
        return None
    try:
        iteration = sealed.read_json(path / RUN).get("iteration")
    except CheckpointError:
        return None
    ours = isinstance(iteration, int) and path.name == name_of(iteration)
    return iteration if ours else None


def resolve(folder: Path) -> tuple[Path, dict]:
    """(checkpoint folder, its run.json). Raises CheckpointError unless both are complete."""
    path = folder
    if not folder.is_dir():
        raise CheckpointError("there is no such folder")
    if (folder / LATEST).is_file():
        path = _latest(folder)
    if path.suffix in (PARTIAL, DELETED):
        what = "a save that never finished" if path.suffix == PARTIAL else "a deleted checkpoint"
        raise CheckpointError(f"it is the rest of {what}")
    if not (path / RUN).is_file():
        raise CheckpointError(f"it has neither {LATEST} nor {RUN}: not a complete checkpoint")
    run = sealed.read_json(path / RUN)
    if run.get("format") != FORMAT:
        raise CheckpointError(
            f"{path / RUN} has format {run.get('format')}; this version: {FORMAT}"
        )
    return path, run


def _latest(folder: Path) -> Path:
    content = (folder / LATEST).read_bytes().strip()
    name = content.decode("ascii", "replace")
    if not NAME.fullmatch(name):
        raise CheckpointError(f"{LATEST} names no checkpoint but {name[:40]!r}")
    path = folder / name
    if path.is_dir():
        return path
    replaced = with_suffix(path, REPLACED)  # killed between the two renames of `publish`
    if replaced.is_dir():
        return replaced
    raise CheckpointError(f"{LATEST} names {name}, which is not there")

"""Names of checkpoint folders: how a checkpoint is published, found and deleted.

A folder `iter_0000120` is always complete. Three suffixes mark folders that are not: one being
written, one moved aside by a newer save of the same iteration, one being deleted. The process may
be killed between any two lines here.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from megatron_mm.checkpoint import sealed
from megatron_mm.checkpoint.plain_pickle import shown
from megatron_mm.errors import CheckpointError

logger = logging.getLogger(__name__)

FORMAT = 3
LATEST, RUN = "latest", "run.json"
PARTIAL, REPLACED, DELETED = ".partial", ".replaced", ".deleted"
NAME = re.compile(r"iter_\d{7,}")


def name_of(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def with_suffix(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def publish(partial: Path, final: Path) -> None:
    """Renames a finished checkpoint into place and points `latest` to it. One rank calls it."""
    folder, replaced = final.parent, with_suffix(final, REPLACED)
    if final.exists():  # the same iteration again: an earlier run, or a resumed one
        final.rename(replaced)
    partial.rename(final)
    sealed.sync_folder(folder)
    pointer = folder / f"{LATEST}{PARTIAL}"
    sealed.write_bytes(pointer, f"{final.name}\n".encode())
    pointer.replace(folder / LATEST)
    sealed.sync_folder(folder)
    if replaced.is_symlink():  # what it leads to is not ours
        replaced.unlink()
    elif replaced.exists():
        shutil.rmtree(replaced)


def check_unused(folder: Path, iteration: int) -> None:
    """Checks that weights without a run, of this iteration, overwrite no checkpoint in a folder,
    which need not exist.

    Raises:
        CheckpointError: it holds checkpoints.
    """
    # A conversion killed while publishing leaves its checkpoint without `latest`. No run finds it
    # there, and `publish` replaces it.
    inside = folder.iterdir() if folder.is_dir() else ()
    found = {path.name for path in inside if NAME.fullmatch(path.name)}
    if (folder / LATEST).exists() or found - {name_of(iteration)}:
        raise CheckpointError(f"{folder} holds checkpoints already: nothing is overwritten")


def clear_leftovers(folder: Path) -> None:
    """Removes what killed or failed saves and deletions left. One rank calls it.

    A checkpoint that was moved aside gets its name back if its successor was never published. What
    cannot be removed, such as another user's, is named and stays.
    """
    (folder / f"{LATEST}{PARTIAL}").unlink(missing_ok=True)
    for path in sorted(folder.iterdir()):
        final = path.with_suffix("")
        if not NAME.fullmatch(final.name) or path.is_symlink() or not path.is_dir():
            continue
        if path.suffix == REPLACED and not final.exists():
            path.rename(final)
        elif path.suffix in (PARTIAL, REPLACED, DELETED):
            try:
                shutil.rmtree(path)
            except OSError as error:
                logger.warning("%s was left by an earlier save and stays: %s", path, error.strerror)


def prune(folder: Path, keep: int, newest: int) -> None:
    """Deletes the oldest checkpoints of a folder until `keep` are left. One rank calls it.

    Only checkpoints up to iteration `newest`, which was just published, are counted and deleted:
    later ones belong to a run that went further before this one was resumed. The checkpoint that
    `latest` names always stays. A folder is renamed before its content is deleted, so a
    half-deleted checkpoint is never loaded.
    """
    latest = (folder / LATEST).read_text(encoding="utf-8").strip()
    found = {_iteration(path): path for path in folder.iterdir()}
    iterations = sorted(iteration for iteration in found if iteration is not None)
    for iteration in [i for i in iterations if i <= newest][:-keep]:
        if found[iteration].name == latest:
            continue
        deleted = found[iteration].rename(with_suffix(found[iteration], DELETED))
        sealed.sync_folder(folder)
        shutil.rmtree(deleted)


def _iteration(path: Path) -> int | None:
    """Iteration of a readable checkpoint; None for anything else."""
    if not NAME.fullmatch(path.name) or path.is_symlink() or not (path / RUN).is_file():
        return None
    try:
        iteration = sealed.read_json(path / RUN).get("iteration")
    except CheckpointError:
        return None
    valid = isinstance(iteration, int) and path.name == name_of(iteration)
    return iteration if valid else None


def resolve(folder: Path) -> tuple[Path, dict]:
    """Returns (checkpoint folder, content of its run.json).

    Args:
        folder: a checkpoint, or a folder of checkpoints whose `latest` names one.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
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
            f"{path / RUN} has format {shown(run.get('format'))}; this version: {FORMAT}"
        )
    _check_run(path, run)
    return path, run


# Keys of run.json that every reader needs, with their types.
KINDS = {
    "iteration": int,
    "identity": str,
    "layout": dict,
    "adam_step": int,
    "scheduler": dict,
    "loader": dict,
    "extra": dict,
    "config": dict,
    "checksums": dict,
}
IDENTITY = re.compile(r"[0-9a-f]{32}", re.ASCII)


def _check_run(path: Path, run: dict) -> None:
    """Checks the outer form of a run.json, and that it is the one of its folder.

    Raises:
        CheckpointError: names the first key that is wrong.
    """
    for key, kind in KINDS.items():
        if type(run.get(key)) is not kind:
            raise CheckpointError(f"{path / RUN} is damaged: {key} is no {kind.__name__}")
    for key in ("iteration", "adam_step"):
        if not 0 <= run[key] < 2**53:
            raise CheckpointError(f"{path / RUN} is damaged: {key} is {shown(run[key])}")
    if not IDENTITY.fullmatch(run["identity"]):
        raise CheckpointError(f"{path / RUN} is damaged: identity is {shown(run['identity'])}")
    for key in ("model", "training"):
        if type(run["config"].get(key)) is not dict:
            raise CheckpointError(f"{path / RUN} is damaged: config.{key} is no dict")
    for key in ("layout", "checksums"):
        if not all(type(value) is int for value in run[key].values()):
            raise CheckpointError(f"{path / RUN} is damaged: {key} holds other things than numbers")
    name = path.name.removesuffix(REPLACED)
    if NAME.fullmatch(name) and name != name_of(run["iteration"]):
        raise CheckpointError(
            f"{path / RUN} is of iteration {run['iteration']}, another than its folder's"
        )


def _latest(folder: Path) -> Path:
    content = sealed.read_all(folder / LATEST).strip()
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

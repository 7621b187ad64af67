"""Settings, files and code that all ranks of a job must share, compared before anything is built.

Ranks that disagree would train on in silence: each with its own learning rate, seed or data. First
every rank sends one digest; only if those differ are the parts sent, and the first that differs is
named. Files are compared by size, time and blocks spread over them. Where only times differ, as
those of copies on the nodes' own disks may, whole files are read instead.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import socket
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_mm import platform
from megatron_mm.checkpoint.folders import LATEST, resolve
from megatron_mm.config import RunConfig, to_dict
from megatron_mm.errors import CheckpointError, ConfigError
from megatron_mm.model.backends.choice import check_dispatcher, choose
from megatron_mm.rl.settings import RLConfig, teacher_folders

logger = logging.getLogger(__name__)

# Settings that may differ between ranks, and why.
MAY_DIFFER = {
    "data.num_workers": "machines have different numbers of cores; the order of rows stays",
    "logging.output_dir": "rank 0 alone writes there",
    "logging.log_interval": "rank 0 alone writes to the console",
    "logging.tensorboard": "rank 0 alone writes it",
    "logging.wandb_mode": "rank 0 alone writes it",
    "logging.wandb_project": "rank 0 alone writes it",
}
PACKAGES = (
    *("torch", "megatron-core", "numpy", "transformers"),
    # Where one of these is missing, or is another, a rank computes with other kernels.
    *("triton", "transformer-engine", "flash-linear-attention", "apex", "deep_ep"),
)
BLOCK, BLOCKS = 1 << 12, 16  # bytes of a file that are read at a time, and how often
# Settings of objectives that name what every rank reads, beside the teachers.
OF_OBJECTIVES = ("skill_map", "mimic_routes", "mimic_map", "ref_load", "dpo_ref_load")
MANY = 64  # files of one setting, beyond which two blocks of each are read


class File(NamedTuple):
    """A file as it is compared: its size in bytes, its time in ns, a digest of its content."""

    size: int
    time: int
    content: str

    def __str__(self) -> str:
        when = datetime.fromtimestamp(self.time / 1e9).isoformat(sep=" ", timespec="milliseconds")
        return f"{self.size:,} bytes of {when}, content {self.content}"


type Parts = dict[str, str | File]


def check_alike(run: RunConfig) -> None:
    """Compares this rank's settings, files, code and world with those of all others. Every rank of
    the job calls it, before groups are built.

    Raises:
        ConfigError: on every rank; names the first part that differs, both values and their ranks.
    """
    if dist.get_world_size() == 1:
        return
    mine = parts_of(run)
    digests: list = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest_of(repr(sorted(mine.items())).encode()))
    if len({*digests}) == 1:
        return
    notes: list = [None] * dist.get_world_size()
    dist.all_gather_object(notes, (socket.gethostname(), os.getcwd(), mine))
    places, parts = [(host, folder) for host, folder, _ in notes], [found for *_, found in notes]
    hosts = [host for host, _ in places]
    problem = difference(hosts, [timeless(found) for found in parts])
    if problem is None:
        doubtful = [name for name in mine if _times_differ(name, parts)]
        logger.info("reading %d files whose times differ between ranks", len(doubtful))
        # Ranks of one host that started in one folder read the same files: the first of them does.
        first = [places.index(place) for place in places]
        reads = first[dist.get_rank()] == dist.get_rank()
        wholes: list = [None] * dist.get_world_size()
        found = {name: _whole(name) for name in doubtful} if reads else None
        dist.all_gather_object(wholes, found)
        problem = difference(hosts, [wholes[reader] for reader in first])
    if problem is not None:
        raise ConfigError(problem)


def difference(hosts: Sequence[str], parts: Sequence[Mapping[str, object]]) -> str | None:
    """Describes the first part that differs between ranks; None if none does.

    Args:
        hosts: of each rank.
        parts: name -> value, of each rank.
    """
    names = list(dict.fromkeys(name for found in parts for name in found))
    for name in names:
        values = [str(found.get(name, "none")) for found in parts]
        if len({*values}) == 1:
            continue
        usual = Counter(values).most_common(1)[0][0]
        odd = next(rank for rank, value in enumerate(values) if value != usual)
        other = values.index(usual)
        if values.count(usual) * 2 == len(values) and odd < other:
            odd, other = other, odd  # no majority: rank 0 is the one to compare with
        return (
            f"{name} differs: rank {odd} on {hosts[odd]} has {values[odd]}, rank {other} on "
            f"{hosts[other]} has {values[other]}; give every rank the same"
        )
    return None


def parts_of(run: RunConfig) -> Parts:
    """Returns what must be the same on all ranks, by name."""
    parts: Parts = {"world": f"{dist.get_world_size()} ranks on {platform.backend()}"}
    parts |= {f"setting {name}": value for name, value in settings_of(run).items()}
    parts["python"] = ".".join(map(str, sys.version_info[:3]))
    parts |= {name: version(name) for name in PACKAGES}
    parts["kernels"] = kernels_of(run)
    parts["code of megatron_mm"] = code_version()
    for module in _own_modules(run):
        parts[f"code of {module}"] = _source(module)
    for path in files_of(run):
        parts |= sampled(path)
    return parts


def kernels_of(run: RunConfig) -> str:
    """Names what the language stack is computed by here, or says why it cannot be."""
    try:
        check_dispatcher(run.parallel)
        backend = choose(run.backend)
    except ConfigError as problem:
        return str(problem)
    parts = (backend.mix, backend.experts, backend.column)
    return ", ".join(f"{part.__module__}.{part.__qualname__}" for part in parts)


def settings_of(run: RunConfig) -> dict[str, str]:
    """Returns the settings that must be the same, as JSON, by their key: `optimizer.lr`."""
    found: dict[str, str] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, part in value.items():
                walk(f"{name}.{key}" if name else key, part)
        elif name not in MAY_DIFFER:
            found[name] = json.dumps(value)

    walk("", to_dict(run))
    return found


def files_of(run: RunConfig) -> list[str]:
    """Returns the files, folders and patterns that settings name and every rank reads."""
    data, checkpoint = run.data, run.checkpoint
    paths: list[str | None] = [phase.path for phase in data.train_data]
    paths += [source.path for phase in data.train_data for source in phase.mixture]
    paths += [data.valid_data, data.tokenizer_model, checkpoint.load, checkpoint.load_hf]
    paths += teacher_folders(run.section(RLConfig)).values()
    for section in run.objectives.values():
        paths += [getattr(section, name, None) for name in OF_OBJECTIVES]
    return list(dict.fromkeys(path for path in paths if path))


def sampled(path: str) -> Parts:
    """Returns what is compared of a file, of the files of a folder, or of those of a pattern."""
    names = sorted(glob(path, recursive=True)) if glob(path) else [path]
    found = [file for name in names for file in _files(Path(name))]
    blocks = 2 if len(found) > MANY else BLOCKS
    return {f"file {file}": _sample(file, blocks) for file in found}


def _files(path: Path) -> Iterator[Path]:
    """Yields a file, or those of a folder; of a folder of checkpoints only the one that is read."""
    if (path / LATEST).is_file():
        yield path / LATEST
        with suppress(CheckpointError):  # whoever reads it says what is wrong
            path, _ = resolve(path)
    if path.is_dir():
        yield from sorted(file for file in path.rglob("*") if file.is_file())
    else:
        yield path


def _sample(path: Path, blocks: int) -> File | str:
    try:
        about = path.stat()
        with path.open("rb") as file:
            parts = []
            last = max(0, about.st_size - BLOCK)
            for place in {number * last // max(1, blocks - 1) for number in range(blocks)}:
                file.seek(place)
                parts.append((place, file.read(BLOCK)))
    except OSError as error:
        return f"none ({error.strerror})"
    content = b"".join(part for _, part in sorted(parts))
    return File(about.st_size, about.st_mtime_ns, digest_of(content))


def timeless(parts: Parts) -> dict[str, object]:
    """Returns the parts without the files' times."""
    return {
        name: f"{value.size:,} bytes, content {value.content}" if isinstance(value, File) else value
        for name, value in parts.items()
    }


def _times_differ(name: str, parts: Sequence[Parts]) -> bool:
    values = [found.get(name) for found in parts]
    return len({value.time for value in values if isinstance(value, File)}) > 1


def _whole(name: str) -> str:
    """Returns a digest of all of a file."""
    try:
        with Path(name.removeprefix("file ")).open("rb") as file:
            return f"content {hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"
    except OSError as error:
        return f"none ({error.strerror})"


def digest_of(*parts: bytes) -> str:
    """Returns 12 digits that tell contents apart."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def version(name: str) -> str:
    """Returns the version of a package that is installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def code_version() -> str:
    """Returns a digest of this package's source files, since the folder need not be a checkout."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return digest_of(*(file.read_bytes() for file in files))


def _own_modules(run: RunConfig) -> Iterable[str]:
    """Names the modules of the user's own that settings name: plug-ins, and dotted paths."""
    named = [
        word
        for key, text in settings_of(run).items()
        if not key.startswith(("checkpoint.", "data.", "logging."))  # paths
        for word in _words(json.loads(text))
    ]
    dotted = [word.partition("(")[0].strip().rpartition(".")[0] for word in named]
    modules = dict.fromkeys([*run.plugins, *(name for name in dotted if name)])
    return [name for name in modules if all(part.isidentifier() for part in name.split("."))]


def _words(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value] if "/" not in value else []
    return [word for part in value for word in _words(part)] if isinstance(value, list) else []


def _source(module: str) -> str:
    """Returns a digest of a module's source; of one that has none, that it has none."""
    try:
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None
        return digest_of(Path(spec.origin).read_bytes())
    # Whatever a package's own import raises: whoever needs the module says so later.
    except Exception:
        return "no source file"

"""Compares software and settings of all ranks of a job, and measures their connection.

`tools/doctor.py` calls it under torchrun. A difference is reported with both values and both hosts.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mm import cli, platform
from megatron_mm.config import ConfigError, ParallelConfig, RunConfig, load, validate
from megatron_mm.doctor.disk import disk
from megatron_mm.errors import LaunchError
from megatron_mm.parallel import descriptors
from megatron_mm.train.alike import PACKAGES, code_version, digest_of, settings_of, version

ROOT = Path(__file__).resolve().parents[2]
GLOO_PATIENCE = datetime.timedelta(seconds=60)  # for all ranks to connect
LARGEST_SKEW = 1.0  # seconds: rendezvous and logs compare clocks of different nodes


def _revision() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "no git"
    return done.stdout.strip() if done.returncode == 0 else "no checkout"


def _run(argv: list[str]) -> tuple[RunConfig | None, str]:
    """Returns (the run, "") or (None, why the settings are wrong)."""
    if not argv:
        return None, ""
    try:
        run = load(None, argv)
        validate(run, dist.get_world_size())
    except ConfigError as error:
        return None, str(error)
    return run, ""


def note(run: RunConfig | None, problem: str) -> dict[str, Any]:
    """Collects what must be equal on all ranks, by name."""
    same: dict[str, Any] = {"python": ".".join(map(str, sys.version_info[:3]))}
    same |= {name: version(name) for name in PACKAGES}
    same |= {"revision": _revision(), "code": code_version(), "config": problem or "none"}
    if torch.cuda.is_available():
        same["gpu"] = torch.cuda.get_device_name()
        same["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        links = sorted(Path("/sys/class/infiniband").glob("*/ports/*/state"))
        states = [f"{p.parts[-4]}:{p.read_text().strip()}" for p in links]
        same["infiniband"] = ", ".join(states) or "none"
    libraries = ("NCCL_", "GLOO_")
    # An interface may have another name on each node.
    words = sorted(
        k
        for k in os.environ
        if (k.startswith(libraries) or k == "OMP_NUM_THREADS") and not k.endswith("_SOCKET_IFNAME")
    )
    same["environment"] = " ".join(f"{k}={os.environ[k]}" for k in words) or "none"
    settings = {} if run is None else settings_of(run)
    if run is not None:
        same["config"] = digest_of(json.dumps(settings, sort_keys=True).encode())
    limit = descriptors.raise_limit()
    return {
        "host": socket.gethostname(),
        "same": same,
        "settings": settings,
        "problem": problem,
        "descriptors": limit,
    }


def difference(notes: list[dict[str, Any]]) -> str | None:
    """Describes the first difference between a rank and rank 0, with the remedy; None if equal."""
    first = notes[0]
    for rank, other in enumerate(notes):
        if other["problem"]:
            return f"rank {rank} on {other['host']} refuses the run: {other['problem']}"
        for name, value in first["same"].items():
            there = other["same"].get(name)
            if there == value:
                continue
            if name == "config":
                name, there, value = _setting(other["settings"], first["settings"])
            remedy = {
                "revision": "check out one revision everywhere",
                "code": "copy one version of megatron_mm everywhere",
                "environment": "export the same variables on every node",
                "infiniband": "repair the link, or leave the node out",
                "gpu": "use nodes of one kind",
            }.get(name, "give every node the same")
            return (
                f"{name} differs: rank {rank} on {other['host']} has {there}, rank 0 on "
                f"{first['host']} has {value}; {remedy}"
            )
    return None


def _setting(there: dict[str, str], here: dict[str, str]) -> tuple[str, str, str]:
    """Returns the first setting that differs, and both values."""
    for key in [*here, *there]:
        if there.get(key) != here.get(key):
            return f"setting {key}", there.get(key, "none"), here.get(key, "none")
    return "config", "another", "one"


def clock_skew() -> list[float]:
    """Returns the seconds by which each rank's clock is ahead of rank 0's: the median over five
    barriers, which ranks leave within milliseconds of each other."""
    rounds = []
    for _ in range(5):
        dist.barrier()
        times: list = [None] * dist.get_world_size()
        dist.all_gather_object(times, time.time())
        rounds.append([t - times[0] for t in times])
    return [statistics.median(r[rank] for r in rounds) for rank in range(len(rounds[0]))]


def gloo_problem() -> str | None:
    """Connects all ranks with gloo, which every run uses beside NCCL and which finds the network in
    a way of its own. Returns what is wrong on this rank; None if nothing. Every rank calls it."""
    try:
        group = dist.new_group(backend="gloo", timeout=GLOO_PATIENCE)
        dist.all_reduce(torch.zeros(1), group=group)
    except RuntimeError as error:
        return " ".join(str(error).split())[:200]
    return None


def bandwidths(megabytes: int) -> dict[str, float]:
    """Returns the bus bandwidth in GB/s of each operation, as nccl-tests defines it: the load of a
    link, independent of the group size."""
    size, device = dist.get_world_size(), platform.device()
    count = megabytes * 2**20 // 4 // size * size
    data, other = (torch.zeros(count, device=device) for _ in range(2))
    share = (size - 1) / size
    found = {}
    operations: dict[str, tuple[Callable[[], Any], float]] = {
        "all-reduce": (lambda: dist.all_reduce(data), 2 * share),
        "all-to-all": (lambda: dist.all_to_all_single(other, data), share),
    }
    for name, (operation, factor) in operations.items():
        seconds = []
        for _ in range(5):
            dist.barrier()
            begin = time.perf_counter()
            operation()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        found[name] = factor * 4 * count / statistics.median(seconds[1:]) / 1e9
    return found


def examine(argv: list[str]) -> tuple[list[tuple[str, str, bool]], str | None]:
    """Examines a started job. Every rank calls it.

    Returns:
        ((name, finding, whether it is fine) of each check, what keeps a run from starting), the
        same on every rank.
    """
    run, problem = _run(argv)
    notes: list = [None] * dist.get_world_size()
    dist.all_gather_object(notes, note(run, problem))
    hosts = sorted({n["host"] for n in notes})
    lines = [("ranks", f"{len(notes)} on {len(hosts)} host(s): {', '.join(hosts[:4])}", True)]
    different = difference(notes)
    if different is not None:
        return lines, different
    same = notes[0]["same"]
    names = ("revision", "code", "config")
    lines.append(("same everywhere", ", ".join(f"{n} {same[n]}" for n in names), True))
    rank = min(range(len(notes)), key=lambda r: notes[r]["descriptors"])
    limit, needed = notes[rank]["descriptors"], descriptors.needed(len(notes))
    few = descriptors.problem(limit, len(notes))
    lines.append(("descriptors", f"{limit:,}, {needed:,} are needed", few is None))
    if few is not None:
        return lines, f"rank {rank} on {notes[rank]['host']}: {few}"
    skew = clock_skew()
    rank = max(range(len(skew)), key=lambda r: abs(skew[r]))
    lines.append(("clocks", f"at most {abs(skew[rank]):.3f} s from rank 0's", True))
    if abs(skew[rank]) > LARGEST_SKEW:
        return lines, (
            f"the clock of rank {rank} on {notes[rank]['host']} is {skew[rank]:+.1f} s from rank "
            f"0's on {notes[0]['host']}, {LARGEST_SKEW:g} s is allowed; "
            "synchronise it (chrony, ntp)"
        )
    problems: list = [None] * len(notes)
    dist.all_gather_object(problems, gloo_problem())
    failed = [r for r, problem in enumerate(problems) if problem]
    lines.append(("gloo", "connects all ranks" if not failed else "does not", not failed))
    if failed:
        return lines, (
            f"gloo does not reach rank {failed[0]} on {notes[failed[0]]['host']} "
            f"({problems[failed[0]]}); set GLOO_SOCKET_IFNAME to the interface between the nodes, "
            "and let a host's name not resolve to 127.0.0.1 or 127.0.1.1"
        )
    if len(notes) > 1:
        for name, speed in bandwidths(256 if torch.cuda.is_available() else 16).items():
            lines.append((name, f"{speed:.3g} GB/s bus bandwidth over all ranks", True))
    if run is not None:
        spaces: list = [None] * len(notes)
        dist.all_gather_object(spaces, disk(run))
        text, _ = spaces[0]
        full = [r for r, (_, enough) in enumerate(spaces) if not enough]
        lines.append(("disk", text, not full))
        if full:
            where = f"rank {full[0]} on {notes[full[0]]['host']}"
            return lines, f"{where}: {spaces[full[0]][0]}; free some, or set another --save"
    return lines, None


def main(argv: list[str], show: Callable[[str, str, bool], None]) -> int:
    """Examines a job under torchrun and shows the findings on rank 0. Returns the exit code, on
    every rank: 0, or 1 if a run cannot start."""
    from megatron_mm.parallel import groups

    platform.end_with_parent()
    platform.quiet()
    try:
        groups.start(ParallelConfig())
    except LaunchError as error:
        return cli.fail(error)
    lines, problem = examine(argv)
    if dist.get_rank() == 0:
        for line in lines:
            show(*line)
        if problem is not None:
            logging.getLogger(__name__).error("%s", problem)
    dist.barrier()
    dist.destroy_process_group()
    return 0 if problem is None else 1

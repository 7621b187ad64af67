"""Hashes of a rank's state, equal only if two runs are bitwise identical."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from megatron_mm.checkpoint import rng
from megatron_mm.checkpoint.optimizer_state import KINDS, owned
from megatron_mm.checkpoint.parameters import parameters
from megatron_mm.engine.engine import Engine


def _add(digest: Any, label: str, value: Any) -> None:
    if torch.is_tensor(value):
        digest.update(f"{label}:{value.dtype}{tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy())
    elif isinstance(value, dict):
        for key, inner in value.items():
            _add(digest, f"{label}.{key}", inner)
    else:
        digest.update(f"{label}={value!r}".encode())


def parameter_hash(engine: Engine) -> str:
    """Returns the sha256 of the names and bits of this rank's parameters."""
    digest = hashlib.sha256()
    for name, param, _ in parameters(engine):
        _add(digest, name, param)
    return digest.hexdigest()


def state_hash(engine: Engine, *, generators: bool = True) -> str:
    """Returns the sha256 of parameters, owned optimizer state, sets of weights that move, schedule
    and random generators."""
    digest = hashlib.sha256(parameter_hash(engine).encode())
    for name, mine in owned(engine).items():
        for kind in KINDS:
            _add(digest, f"{kind}.{name}[{mine.start}:{mine.stop}]", mine.tensor(kind))
        _add(digest, f"step.{name}", mine.step)
    for which, moving in engine.moving.items():
        _add(digest, f"moving.{which}", dict(sorted(moving.weights.items())))
    _add(digest, "scheduler", engine.scheduler.state_dict())
    if generators:
        _add(digest, "rng", rng.capture())
    return digest.hexdigest()

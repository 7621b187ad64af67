"""Captures and restores every random generator of this rank."""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import random as tensor_parallel_random

from megatron_mm.checkpoint.collective import one_line
from megatron_mm.errors import CheckpointError


def _tracker():
    # Asking for the tracker would create it, so its flag is read first (random.py:412).
    if not tensor_parallel_random._CUDA_RNG_STATE_TRACKER_INITIALIZED:
        return None
    tracker = tensor_parallel_random.get_cuda_rng_tracker()
    return tracker if tracker.is_initialized() else None


def capture() -> dict[str, Any]:
    """Returns states of only numbers, tuples and uint8 tensors, so that loading runs no code."""
    name, keys, *rest = np.random.get_state()
    tracker = _tracker()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": None if tracker is None else dict(tracker.get_states()),
    }


def checked(content: bytes, path: Path) -> dict[str, Any]:
    """Returns the states in the bytes of a generator file, tried on generators of its own.

    Raises:
        CheckpointError: they are none.
    """
    try:
        # Stored, not compressed, as torch writes them: what is unpacked is no larger than the file.
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if any(entry.compress_type or entry.flag_bits & 1 for entry in archive.infolist()):
                raise CheckpointError("it is compressed")
        state = torch.load(io.BytesIO(content), weights_only=True)
        name, keys, *rest = state["numpy"]
        random.Random().setstate(state["python"])
        np.random.RandomState().set_state((name, np.array(keys, dtype=np.uint32), *rest))
        torch.Generator().set_state(state["torch"])
        tracker = {} if state["tracker"] is None else state["tracker"]
        for found in (state["cuda"], *tracker.values()):
            if found is not None and (found.dtype, found.dim()) != (torch.uint8, 1):
                raise CheckpointError("a generator's state is no list of bytes")
    # A forged pickle makes torch and the generators fail in many ways.
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {one_line(error)}") from error
    return state


def restore(state: dict[str, Any]) -> None:
    """Sets the generators to captured states. A tracker that no longer exists is not made."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tracker = _tracker()
    if tracker is not None and state["tracker"] is not None:
        tracker.set_states(state["tracker"])

"""Whether flash-linear-attention can be used on this machine. Imports no megatron-core, which the
doctor must not need."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch
from packaging.version import Version

FIRST = "0.6"  # before it there is no module of the convolution, and grouped values are ignored
INSTALL = "pip install -e '.[cuda]' on a machine with CUDA"
# Versions of Triton whose kernels compute a gated backward pass wrongly on Hopper, the first and
# the one behind the last (fla-org/flash-linear-attention#640).
WRONG_ON_HOPPER = ("3.4.0", "3.7.1")


def missing_fla() -> str | None:
    """The reason why flash-linear-attention cannot be used here; None if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device; allowed here: auto, torch"
    if importlib.util.find_spec("fla") is None:
        return f"flash-linear-attention is not installed: {INSTALL}"
    if (found := _version()) is not None and found < Version(FIRST):
        return f"flash-linear-attention is {found}; allowed: {FIRST} or newer: {INSTALL}"
    return _missing_gradients()


def _version() -> Version | None:
    """Its version; None of a copy that was not installed by pip."""
    try:
        return Version(importlib.metadata.version("flash-linear-attention"))
    except importlib.metadata.PackageNotFoundError:
        return None


def _missing_gradients() -> str | None:
    """The reason why its backward pass would raise, as `chunk_bwd_dqkwg` says in its
    fla/ops/common/chunk_o.py; None if it runs."""
    import triton

    version, (first, right) = Version(triton.__version__), WRONG_ON_HOPPER
    if torch.cuda.get_device_capability()[0] != 9 or not Version(first) <= version < Version(right):
        return None
    from fla.ops.common.backends.tilelang import CommonTileLangBackend

    instead = CommonTileLangBackend()
    if instead.is_available() and instead.is_enabled():
        return None
    return (
        f"flash-linear-attention has no backward pass on Hopper with Triton {version} (allowed: "
        f"below {first}, from {right}) unless TileLang and nvcc are there: "
        "pip install 'tilelang[nvcc]'"
    )

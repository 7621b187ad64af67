"""Process-wide choices of torch's, cuBLAS's and NCCL's algorithms, before any of them has begun."""

from __future__ import annotations

import logging
import os

import torch

from megatron_mm.config import ConfigError, RunConfig
from megatron_mm.model.backends.choice import slow_delta_rule

logger = logging.getLogger(__name__)

# NCCL's that add in one order every time, as Megatron-LM names them (arguments.py).
REPEATABLE = ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS")


def choose_kernels(run: RunConfig) -> None:
    """Settles how this process computes. A command calls it before it joins the job.

    Raises:
        ConfigError: `deterministic_mode`, and the environment asks for what cannot be repeated.
    """
    # cuDNN would make a plan for every new length, and microbatches have lengths of their own.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # NCCL would register the buffers of collectives in a CUDA graph (of a decoding step), which
    # must not lie in memory that grows (PYTORCH_ALLOC_CONF=expandable_segments); megatron-core asks
    # for the same (transformer/cuda_graphs.py).
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    # As examples/launch/node.sh sets them, for a run that torchrun starts: the order in which
    # megatron-core issues communication, and memory for lengths that change.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    slow = slow_delta_rule(run.backend)
    if slow is not None:
        logger.warning("%s", slow)
    if not run.backend.deterministic_mode:
        return
    asked = os.environ.setdefault("NCCL_ALGO", REPEATABLE[0])
    if asked not in REPEATABLE:
        raise ConfigError(
            f"NCCL_ALGO is {asked!r} in the environment; allowed with deterministic_mode: "
            f"{', '.join(REPEATABLE)}, or unset"
        )
    for name, value, others in (
        ("CUBLAS_WORKSPACE_CONFIG", ":4096:8", (":16:8",)),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0", ()),  # Transformer Engine's attention
    ):
        asked = os.environ.setdefault(name, value)
        if asked not in (value, *others):
            raise ConfigError(
                f"{name} is {asked!r} in the environment; allowed with deterministic_mode: "
                f"{', '.join((value, *others))}, or unset"
            )
    torch.use_deterministic_algorithms(True)

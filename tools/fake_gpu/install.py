"""Makes this process one of a machine with a GPU that is not there."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from tools.fake_gpu import varlen
from tools.fake_gpu.collectives import PretendedNCCL
from tools.fake_gpu.cuda import REPLACEMENTS, Replacement
from tools.fake_gpu.functions import Functions
from tools.fake_gpu.operators import Operators
from tools.fake_gpu.process import GPU, Gpu

NCCL = [
    Replacement(owner, name, value)
    for owner in (dist, dist.distributed_c10d)
    for name, value in {
        "ProcessGroupNCCL": PretendedNCCL,
        "is_nccl_available": lambda: True,
    }.items()
]


def install() -> Gpu:
    """Pretends a GPU for the rest of this process's life, and returns it. A second call changes
    nothing. Call it before megatron and megatron_mm are imported: both ask for CUDA as they are.

    Raises:
        RuntimeError: megatron-core was imported, for a machine without CUDA; or a GPU is there.
    """
    if torch.cuda.current_device is _replaced("current_device"):
        return GPU
    if torch.cuda.is_available():
        raise RuntimeError("this machine has a GPU: hide it with CUDA_VISIBLE_DEVICES=''")
    if "megatron" in sys.modules:
        raise RuntimeError("pretend a GPU before megatron is imported: it asks for CUDA then")
    for owner, name, value in (*REPLACEMENTS, *NCCL):
        setattr(owner, name, value)
    varlen.install()
    Functions().__enter__()
    Operators().__enter__()
    return GPU


def _replaced(name: str) -> object:
    return next(r.value for r in REPLACEMENTS if (r.owner, r.name) == (torch.cuda, name))

"""Job in which a converting command runs."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_mm import cli
from megatron_mm.config import ConfigError, ParallelConfig
from megatron_mm.errors import CheckpointError, LaunchError
from megatron_mm.parallel import groups

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def run_job(work: Callable[[dist.ProcessGroup], list[str]]) -> int:
    """Runs `work` on every rank of the job (torchrun's, or one of a single rank) and prints the
    lines it returns on rank 0. Returns the exit code: 0, 2 for a ConfigError, 1 for any
    other error that is told."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    status, started = 0, not dist.is_initialized()
    try:
        if started:
            groups.start(ParallelConfig())
        for line in work(patient_group()):
            if cli.rank() == 0:
                cli.say(line)
    except (CheckpointError, ConfigError, LaunchError) as error:
        status = cli.fail(error)
    if started and dist.is_initialized():
        dist.destroy_process_group()
    return status


def patient_group() -> dist.ProcessGroup:
    """Makes a gloo group of all ranks that waits while one writes its share of a large model."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=2))

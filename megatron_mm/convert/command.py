"""What the converting tools share: the job they run in and how they end."""

from __future__ import annotations

import datetime
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist

from megatron_mm.config import ConfigError, ParallelConfig
from megatron_mm.errors import CheckpointError
from megatron_mm.parallel import groups

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Parser(ArgumentParser):
    """Flags of a tool; what is wrong with them is a ConfigError."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def run_job(work: Callable[[dist.ProcessGroup], list[str]]) -> int:
    """Run `work` on every rank of the job (torchrun's, or one of a single rank), print what it
    returns on rank 0. Exit status: 0; 1 for a CheckpointError, 2 for a ConfigError."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    rank, status = int(os.environ.get("RANK", "0")), 0
    started = not dist.is_initialized()
    try:
        if started:
            groups.start(ParallelConfig())
        timeout = datetime.timedelta(hours=2)  # a rank's share of a large model
        for line in work(dist.new_group(backend="gloo", timeout=timeout)):
            if rank == 0:
                print(line)
    except (CheckpointError, ConfigError) as error:
        # These are raised on every rank alike, so one of them speaks.
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        status = 2 if isinstance(error, ConfigError) else 1
    if started and dist.is_initialized():
        dist.destroy_process_group()
    return status

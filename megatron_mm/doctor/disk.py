"""Room for checkpoints: free disk space against the size of one, from a run's settings alone."""

from __future__ import annotations

import shutil
from math import prod
from pathlib import Path

import torch

from megatron_mm.checkpoint.shards import kinds_saved
from megatron_mm.config import RunConfig
from megatron_mm.engine.optimizer import module_of
from megatron_mm.model.blueprint import outline
from megatron_mm.model.layers.lora import is_adapter
from megatron_mm.rl.reference_settings import ReferenceConfig

STATE_BYTES = torch.float32.itemsize  # of an element of the optimizer's state


def checkpoint_bytes(run: RunConfig) -> int:
    """Returns the bytes of the tensors that a run saves: every weight, the optimizer's state of
    those that learn, and a reference model that moves."""
    reference = run.section(ReferenceConfig)
    averages = reference.ref_model_mixup_alpha < 1  # it is then kept in fp32
    total = 0
    for name, (dtype, layout) in outline(run).items():
        each = dtype.itemsize
        if run.trains(module_of(name)) or is_adapter(name):
            each += STATE_BYTES * len(kinds_saved(dtype))
        if reference.sync_ref_model:
            each += torch.float32.itemsize if averages else dtype.itemsize
        total += each * prod(layout.global_shape)
    return total


def disk(run: RunConfig) -> tuple[str, bool]:
    """Compares free disk space with the size of a checkpoint. Returns (text, whether it fits)."""
    folder = Path(run.checkpoint.save or run.logging.output_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    needed = checkpoint_bytes(run) if run.checkpoint.save else 0
    text = f"{free / 1e9:,.1f} GB free at {there}"
    if needed:
        text += f", a checkpoint needs {needed / 1e9:,.1f} GB"
    return text, free > needed

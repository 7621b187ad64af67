"""What stops a conversion."""

from __future__ import annotations

from megatron_mm.checkpoint.errors import CheckpointError


class ConvertError(CheckpointError):
    """A conversion cannot be done. One line that names the tensor or the file."""

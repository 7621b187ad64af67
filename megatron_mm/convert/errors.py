"""What stops a conversion."""

from __future__ import annotations


class ConvertError(RuntimeError):
    """A conversion cannot be done. One line that names the tensor or the file."""

"""What stops a run on purpose."""

from __future__ import annotations


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not finite. Raised before the update, on every rank."""

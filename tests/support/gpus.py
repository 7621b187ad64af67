"""Ranks on GPUs that are not there."""

from __future__ import annotations

from tools.fake_gpu import install


def pretend() -> None:
    """Makes this process one with a GPU, and gives it torch's kernel for packed attention, which
    the CPU behind that GPU lacks."""
    install()
    from support import varlen

    varlen.install()

"""Pretended GPUs for the checks of a visit, some with a planted fault. Called in the process that
runs the checks, before it imports torch."""

from __future__ import annotations

import os
from typing import Any


def pretend() -> Any:
    """A pretended GPU."""
    from tools.fake_gpu import install

    return install()


def with_wrong_delta_rule() -> Any:
    """One on which the delta rule forgets too slowly: decays are 1 % off. The CPU's is right."""
    gpu = pretend()
    from megatron_mm.model.layers.gdn import mix

    right = mix.stream_delta_rule

    def wrong(query, key, value, log_decay, *rest):
        return right(query, key, value, log_decay * (0.99 if key.is_cuda else 1.0), *rest)

    mix.stream_delta_rule = wrong
    return gpu


def with_a_dying_check() -> Any:
    """One on which the check of the delta rule ends the process, and that of experts ends CUDA."""
    gpu = pretend()
    import torch

    from megatron_mm.benchmark.gpu import delta_rule, experts

    def ends_cuda(visit, row):
        def unusable():
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        torch.cuda.synchronize = unusable
        raise ValueError("planted")

    delta_rule.check = lambda visit, row: os._exit(9)
    experts.check = ends_cuda
    return gpu

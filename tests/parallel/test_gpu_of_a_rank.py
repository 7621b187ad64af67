"""Which GPU a rank takes."""

from __future__ import annotations

import pytest
import torch

from megatron_mm.errors import LaunchError
from megatron_mm.parallel import groups


def test_a_rank_takes_the_gpu_of_its_number_on_the_node(monkeypatch):
    """More ranks than GPUs, or a scheduler that shows each rank one, are one line."""
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("RANK", "11")
    groups._take_gpu(3, 4)
    assert taken == [3]
    with pytest.raises(LaunchError, match=r"rank 11 is number 4 on .* where 4 GPUs are visible"):
        groups._take_gpu(4, 4)
    assert taken == [3]

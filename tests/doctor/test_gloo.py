"""Whether the doctor names a host that gloo does not reach."""

from __future__ import annotations

from unittest import mock

import torch.distributed as dist

from megatron_mm.doctor import ranks as doctor


def on_rank_without_gloo() -> tuple[list, str | None, str | None]:
    """The doctor's lines and problem where rank 1 finds no network for gloo; this rank's own."""
    own = doctor.gloo_problem()
    found = "connection refused" if dist.get_rank() else None
    with mock.patch.object(doctor, "gloo_problem", lambda: found):
        lines, problem = doctor.examine([])
    return lines, problem, own


def test_a_host_that_gloo_does_not_reach_is_named(ranks):
    """NCCL finds the network in another way, so its all-reduce says nothing of it."""
    for lines, problem, own in ranks(2, on_rank_without_gloo):
        assert own is None and ("gloo", "does not", False) in lines
        assert problem.startswith("gloo does not reach rank 1 on ")
        assert "connection refused" in problem and "GLOO_SOCKET_IFNAME" in problem
        assert "\n" not in problem

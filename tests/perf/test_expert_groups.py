"""Expert-parallel groups and nodes: where they lie, what an exchange costs, what a search finds."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_mm.config import load
from megatron_mm.perf import search
from megatron_mm.perf.fake import fake_job
from megatron_mm.perf.hardware import Assumptions, gpu
from megatron_mm.perf.layout import plan_layout
from megatron_mm.perf.predict import collective
from megatron_mm.perf.recorder import Recorder

H100 = gpu("H100")
# Peaks as published, and a host that never delays the device: an exchange is then the difference.
ASSUMED = Assumptions(1.0, 1.0, 1.0, launch=0.0, wait=0.0)
WORLD = 32  # four nodes
SILENT = SimpleNamespace(total=None, update=lambda *_: None, set_description=lambda *_: None)


def experts_run(experts: int):
    """A model that is mostly experts, on a layout without tensor or pipeline parallelism."""
    run = load(argv=["--preset", "small", "--bf16", "--seq-length", "2048"])
    # Of many microbatches: what replicas exchange once a step would favour large groups.
    run.training.global_batch_size, run.data.max_num_tiles = 32 * WORLD, 1
    run.model.language.num_experts, run.model.language.moe_ffn_hidden_size = 64, 512
    run.parallel.expert_model_parallel_size = experts
    run.parallel.expert_tensor_parallel_size = 1
    return run


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("experts", [4, 8, 16])
def test_a_group_of_up_to_eight_lies_in_one_node(tp, experts):
    """Ranks are numbered tp, cp, dp, pp and, for experts, ep first (megatron-core's order)."""
    run = experts_run(experts)
    run.parallel.tensor_model_parallel_size = tp
    for rank in range(0, WORLD, 5):
        with fake_job(run, rank, WORLD) as groups:
            group = Recorder(groups.pg).groups()["ep"]
        first = rank // experts * experts
        assert group == tuple(range(first, first + experts))
        assert len({member // H100.domain for member in group}) == max(1, experts // 8)


def test_an_exchange_between_nodes_costs_five_times_one_inside():
    """Inside each rank sends 7/8 over NVLink; of 16 ranks half, through its own adapter."""
    inside = collective("all_to_all", 1e9, range(8), H100, ASSUMED)
    outside = collective("all_to_all", 1e9, range(16), H100, ASSUMED)
    assert inside == pytest.approx(7 / 8 / 450) and outside == pytest.approx(1 / 2 / 50)
    # 72 GPUs of a rack are one domain.
    rack = gpu("GB200")
    assert collective("all_to_all", 1e9, range(64), rack, ASSUMED) == pytest.approx(63 / 64 / 900)


def test_a_search_keeps_experts_inside_a_node_where_that_is_faster(monkeypatch):
    """Of layouts that differ in nothing else the fastest is the one inside a node, as long as it
    fits; where only more ranks hold the experts, the group leaves the node."""
    sizes = (4, 8, 16, 32)
    monkeypatch.setattr(search, "candidates", lambda *_: [experts_run(size) for size in sizes])
    plans = {size: plan_layout(experts_run(size), WORLD, H100, ASSUMED) for size in sizes}
    seconds = {size: plan.prediction.seconds for size, plan in plans.items()}
    assert seconds[8] < seconds[16] < seconds[32]
    # The same bytes, but for the share that a rank keeps: (ranks - 1) / ranks of them leave it.
    talk = {size: plan.prediction.by_term["collectives"] for size, plan in plans.items()}
    assert talk[16] > 4 * talk[8]

    def found(holds: int) -> int:
        """The layout that is found where memory suffices for `holds` expert-parallel ranks."""
        memory = 1.01 * plans[holds].peak / (1 - ASSUMED.reserved)
        small = replace(H100, memory=memory)
        result = search.search(experts_run(8), WORLD, small, ASSUMED, 1, 1.0, 1, SILENT)
        return result.plans[0].run.parallel.expert_model_parallel_size

    assert plans[4].peak > 1.05 * plans[8].peak > 1.05**2 * plans[16].peak
    assert found(8) == 8
    assert found(16) == 16

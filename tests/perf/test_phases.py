"""The split of a step's time: whole, in the right groups, with the bytes that were sent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from megatron_mm.data.batch import Microbatch
from megatron_mm.engine.engine import Engine
from megatron_mm.parallel import groups
from megatron_mm.parallel.groups import Groups
from megatron_mm.perf import phases as phases_module
from megatron_mm.perf.fake import fake_job
from megatron_mm.perf.phases import OPERATIONS, Phases
from megatron_mm.train.sft import SupervisedFineTuning
from support.batches import microbatch, small_run


def one_step(settings: dict) -> dict:
    """A step of two microbatches, split; and what the engine's own tensors say of its bytes."""
    run = small_run()
    for name, value in settings.items():
        setattr(run.parallel, name, value)
    built = groups.build(run.parallel)
    engine = Engine.create(run, built)
    multiple = built.pg.tp_cp.size()
    batches = [microbatch(run.model, seed, (1, 0), multiple) for seed in (1, 2)]
    methods = {name: getattr(dist.ProcessGroup, name) for name in OPERATIONS}
    with Phases(built) as phases:
        with phases.region("step"):
            engine.forward_backward(batches, SupervisedFineTuning())
            with phases.region("optimizer"):
                engine.update(engine.gradient_norm())
        whole = sum(span.seconds for span in phases._spans if span.name == "step")
        split = phases.take()
    restored = all(getattr(dist.ProcessGroup, name) is m for name, m in methods.items())
    buffers = [b for m in engine.models for b in m.buffers + m.expert_parallel_buffers]
    return {
        "split": split,
        "whole": whole,
        "restored": restored,
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "wire": sum(map(partial(wire_bytes, engine), batches)),
        "nothing left": phases.take() == {},
    }


def wire_bytes(engine: Engine, batch: Microbatch) -> int:
    """Bytes of the packed tensor that leaves this stage."""
    (stage,), width = engine.chunks, engine.config.hidden_size
    if stage.leaves is None:
        return 0
    shape = stage._wire_shape(batch, stage.leaves, images=True)
    rows = shape.hidden_rows * (1 + len(shape.refinements))
    (memory,) = shape.memories
    return 4 * (rows * width + memory.rows * memory.width)


def of_kind(split: dict, start: str) -> dict:
    return {name: entry for name, entry in split.items() if name.startswith(start)}


def check_whole(found: dict) -> None:
    parts = found["split"]
    assert found["restored"] and found["nothing left"]
    assert {"forward", "backward", "optimizer", "other"} <= parts.keys()
    assert all(entry["seconds"] >= 0 for entry in parts.values())
    # The parts are disjoint and cover the step: equal but for the sum's own rounding.
    assert abs(sum(entry["seconds"] for entry in parts.values()) - found["whole"]) < 1e-6


def test_replicas_reduce_every_gradient_once(ranks):
    for found in ranks(2, one_step, {}):
        check_whole(found)
        parts = found["split"]
        assert not of_kind(parts, "tp") and not of_kind(parts, "pp")
        sent = of_kind(parts, "dp") | of_kind(parts, "edp")
        reduced = [e for n, e in sent.items() if n.endswith("reduce-scatter")]
        assert sum(entry["bytes"] for entry in reduced) == found["gradients"]


def test_stages_send_what_the_wire_holds(ranks):
    first, last = ranks(2, one_step, {"pipeline_model_parallel_size": 2})
    for found in (first, last):
        check_whole(found)
        assert not of_kind(found["split"], "tp")
        assert found["split"]["pp send/recv"]["calls"] >= 4  # both ways, two microbatches
        assert found["split"]["pp send/recv"]["seconds"] > 0
    # As much comes back as gradients as went forward.
    forward, back = (found["split"]["pp send/recv"]["bytes"] for found in (first, last))
    assert forward == back == first["wire"] > 0


def test_tensor_and_expert_parallel_ranks(ranks):
    layout = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}
    layout["expert_tensor_parallel_size"] = 1
    for found in ranks(2, one_step, layout):
        check_whole(found)
        kinds = found["split"].keys()
        assert {"tp all-gather", "tp reduce-scatter"} <= kinds
        assert any(name.endswith("all-to-all") for name in kinds)


def test_what_overlaps_counts_while_it_is_waited_for(ranks):
    layout = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    for found in ranks(2, one_step, layout):
        check_whole(found)
        reduced = [e for n, e in found["split"].items() if n.endswith("reduce-scatter")]
        assert sum(entry["bytes"] for entry in reduced) == found["gradients"]


class FakeWork:
    def wait(self) -> bool:
        time.sleep(0.01)
        return True


@contextmanager
def coalescing_stages(monkeypatch) -> Iterator[Groups]:
    """Groups of two stages that answer as NCCL's do: of operations that are coalesced only the end
    returns something to wait for."""
    monkeypatch.setattr(dist.ProcessGroup, "send", lambda *_: None)
    monkeypatch.setattr(dist.ProcessGroup, "recv", lambda *_: None)
    monkeypatch.setattr(dist.ProcessGroup, "_end_coalescing", lambda *_: FakeWork())
    run = small_run()
    run.parallel.pipeline_model_parallel_size = 2
    with fake_job(run, 0, 2) as built:
        yield replace(built, replica=built.world)  # with its stages in a group of their own


def test_neighbours_that_are_coalesced_are_one_kind_with_bytes_and_seconds(monkeypatch):
    """As torch's `batch_isend_irecv` does with NCCL."""
    with coalescing_stages(monkeypatch) as built, Phases(built) as phases:
        pp = built.pg.pp
        with phases.region("step"):
            pp.send([torch.zeros(250)], 1, 0)
            pp.recv([torch.zeros(250)], 1, 0)
            assert pp._end_coalescing(torch.device("cpu")).wait()
        found = phases.take()
    assert found.keys() == {"other", "pp send/recv"}
    sent = found["pp send/recv"]
    assert (sent["calls"], sent["bytes"]) == (2, 1000) and sent["seconds"] >= 0.01


def test_nothing_is_timed_while_a_graph_is_captured(monkeypatch):
    """An event that was recorded in a capture has no time; asking for it is an error of CUDA's."""
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with coalescing_stages(monkeypatch) as built, Phases(built) as phases:
        monkeypatch.setattr(phases_module.platform, "device", lambda: torch.device("cuda"))
        monkeypatch.setattr(phases_module, "_mark", time.perf_counter)

        def talk():
            built.pg.pp.send([torch.zeros(250)], 1, 0)
            return built.pg.pp._end_coalescing(torch.device("cpu"))

        with phases.region("step"):
            waiting = talk()
            capturing = True
            assert isinstance(talk(), FakeWork)  # torch's own
            assert waiting.wait()
            with phases.region("forward"):
                talk()
            capturing = False
        found = phases.take()
    assert found.keys() == {"other", "pp send/recv"}
    assert (found["pp send/recv"]["calls"], found["pp send/recv"]["bytes"]) == (1, 1000)
    assert found["pp send/recv"]["seconds"] < 0.01 <= found["other"]["seconds"]


def one_region() -> tuple[list, dict]:
    built = groups.build(small_run().parallel)
    with Phases(built) as phases:
        dist.all_reduce(torch.zeros(4), group=built.pg.dp)  # outside of a step: not counted
        with phases.region("step"), phases.region("rollout"), phases.region("forward"):
            dist.all_reduce(torch.zeros(1000), group=built.pg.dp)
        found = phases.take()
    return sorted(found), found["dp all-reduce"]


def test_a_phase_inside_a_phase_belongs_to_it(ranks):
    for names, reduced in ranks(2, one_region):
        assert names == ["dp all-reduce", "other", "rollout"]
        assert reduced["bytes"] == 4000 and reduced["calls"] == 1

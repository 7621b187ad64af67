"""CUDA graphs on the fake GPU: what they compute again, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from tools.fake_gpu import install


def on_rank_recorded() -> dict[str, object]:
    device = install()
    state, found = torch.zeros(3, device="cuda"), {}
    given = torch.tensor([1.0, 2.0, 3.0], device="cuda")

    def step() -> torch.Tensor:
        room = torch.empty(3, device="cuda")
        state.add_(given)
        state.view(3)[:1].mul_(2)  # a part of it
        torch.mul(state, 10, out=room)
        return room.exp().log().sum(0, keepdim=True)

    graph = torch.cuda.CUDAGraph()
    with device.counting() as counts, torch.cuda.graph(graph):
        out = step()
    found["recording"] = (state.tolist(), out.tolist(), counts.launches.total())
    with device.counting() as counts:
        graph.replay()
    found["first"] = (state.tolist(), out.tolist(), counts.launches.total())
    given.fill_(1.0)
    graph.replay()
    found["second"] = (state.tolist(), out.tolist())
    return found


def test_a_graph_computes_when_it_is_replayed(gpu_ranks):
    """With the values that its tensors hold then; the recording changes none. Of a replay, the
    whole graph is one launch."""
    found = gpu_ranks(1, on_rank_recorded)[0]
    before, out, launches = found["recording"]
    assert before == [0.0, 0.0, 0.0] and out[0] != out[0] and launches == 0
    state, out, launches = found["first"]
    assert state == [2.0, 2.0, 3.0] and out == pytest.approx([70.0]) and launches == 1
    state, out = found["second"]
    assert state == [6.0, 3.0, 4.0] and out == pytest.approx([130.0])


REFUSED = {
    "item": lambda x: x.sum().item(),
    "nonzero": lambda x: x.nonzero(),
    "copy from the CPU": lambda x: torch.ones(3).cuda(),
    "tensor": lambda x: torch.tensor([1.0], device="cuda"),
    "copy from memory that is not pinned": lambda x: torch.ones(3).to("cuda", non_blocking=True),
}


def on_rank_refusals() -> dict[str, str]:
    install()
    x, answers = torch.ones(3, device="cuda"), {}
    for name, attempt in REFUSED.items():
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                attempt(x)
            answers[name] = "nothing"
        except RuntimeError as error:
            answers[name] = str(error)
    answers["after"] = str(torch.cuda.is_current_stream_capturing())
    return answers


def test_nothing_waits_in_a_graph(gpu_ranks):
    answers = gpu_ranks(1, on_rank_refusals)[0]
    assert answers.pop("after") == "False"
    for name, said in answers.items():
        assert f"not permitted when stream is capturing: {name} at tests/fake_gpu/" in said

"""The fake GPU refuses, waits and counts, operator by operator, as CUDA does.

A function that starts with `on_rank_` runs on the fake GPU; the test looks at its answer.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from tools.fake_gpu import Events, install
from tools.fake_gpu.counts import PARAMETERS


def cpu(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def gpu(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device="cuda")


def rows() -> torch.Tensor:
    return torch.tensor([0, 1])


REFUSED = {
    "a sum": lambda: gpu(3) + cpu(3),
    "a sum into the CPU": lambda: cpu(3).add_(gpu(3)),
    "a number on the GPU": lambda: cpu(3) * gpu(),
    "a product": lambda: gpu(2, 2) @ cpu(2, 2),
    "a product of integers": lambda: gpu(2, 2).long() @ gpu(2, 2).long(),
    "a choice": lambda: torch.where(cpu(3) > 0, gpu(3), 0.0),
    "parts": lambda: torch.cat([gpu(3), cpu(3)]),
    "rows chosen": lambda: gpu(3).index_select(0, rows()),
    "a gather": lambda: gpu(2, 2).gather(1, torch.zeros(2, 1, dtype=torch.int64)),
    "an index of the CPU's": lambda: cpu(3)[rows().cuda()],
    "a value written": lambda: gpu(3).index_put_((rows(),), cpu(2)),
    "an embedding": lambda: torch.nn.functional.embedding(rows(), gpu(3, 2)),
    "attention": lambda: torch.nn.functional.scaled_dot_product_attention(
        gpu(1, 1, 2, 4), gpu(1, 1, 2, 4), cpu(1, 1, 2, 4)
    ),
    "numpy": lambda: gpu(3).numpy(),
    "pinning": lambda: gpu(3).pin_memory(),
    "another data": lambda: setattr(gpu(3), "data", cpu(3)),
    "a generator": lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
    "another rank's device": lambda: torch.ones(3, device="cuda:1"),
    "a device too many": lambda: torch.cuda.set_device(8),
}
ALLOWED = {
    "a number on the CPU": lambda: gpu(3) * cpu(),
    "a number filled in": lambda: gpu(3).masked_fill_(gpu(3) > 0, cpu()),
    "a value written": lambda: gpu(3).index_put_((rows().cuda(),), cpu()),
    "a copy": lambda: cpu(3).copy_(gpu(3)),
    "an index from the CPU": lambda: gpu(3)[rows()],
    "meta by its name": lambda: torch.ones(3, device="meta"),
}
# Why the host waits in each, once.
WAITS = {
    "item": lambda: gpu().item(),
    "tolist": lambda: gpu(3).tolist(),
    "copy to the CPU": lambda: gpu(3).cpu(),
    "copy from the CPU": lambda: cpu(3).cuda(),
    "tensor": lambda: torch.tensor([1.0], device="cuda"),
    "nonzero": lambda: gpu(3).nonzero(),
    "masked_select": lambda: gpu(3).masked_select(gpu(3) > 0),
    "unique": lambda: gpu(3).unique(),
    "index by a mask": lambda: gpu(3)[gpu(3) > 0],
    "index from the CPU": lambda: gpu(3)[rows()],
    "repeat_interleave": lambda: gpu(3).repeat_interleave(gpu(3).long()),
    "equal": lambda: torch.equal(gpu(3), gpu(3)),
    "cuda.synchronize": lambda: torch.cuda.synchronize(),
    "event.synchronize": lambda: torch.cuda.Event().synchronize(),
}
FREE = {
    "a copy from pinned memory": lambda: cpu(3).pin_memory().to("cuda", non_blocking=True),
    "a copy not waited for": lambda: gpu(3).to("cpu", non_blocking=True),
    "a sum": lambda: gpu(3).sum() + 1.0,
    "a fill": lambda: gpu(3).masked_fill_(gpu(3) > 0, 2.0),
    "a mask that is filled": lambda: gpu(3).__setitem__(gpu(3) > 0, 2.0),
    "repeats of a known number": lambda: gpu(3).repeat_interleave(gpu(3).long(), output_size=3),
    "a device that is asked for": lambda: (gpu(3).is_cuda, gpu(3).device, gpu(3).shape),
}
LAUNCHES = {  # kernels
    "a view": (0, lambda x: x.view(2, 2).t()[0]),
    "an allocation": (0, lambda x: torch.empty_like(x)),
    "a sum": (1, lambda x: x + x),
    "a sum in place": (1, lambda x: x.add_(x)),
    "a product into a result": (1, lambda x: torch.mm(x.view(2, 2), x.view(2, 2), out=gpu(2, 2))),
    "a copy": (1, lambda x: x.to(torch.bfloat16)),
    "attention": (1, lambda x: sdpa(*[x.view(1, 1, 2, 2)] * 3)),
}


def sdpa(*qkv: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*qkv)


def on_rank_refusals(which: str) -> dict[str, str]:
    answers = {}
    for name, attempt in {"refused": REFUSED, "allowed": ALLOWED}[which].items():
        try:
            attempt()
            answers[name] = "nothing"
        except (RuntimeError, TypeError) as error:
            answers[name] = str(error)
    return answers


def on_rank_waits() -> tuple[dict[str, dict], dict[str, dict]]:
    device, answers = install(), []
    for table in (WAITS, FREE):
        answers.append({})
        for name, attempt in table.items():
            with device.counting() as counts:
                attempt()
            answers[-1][name] = dict(counts.waits.by("what"))
    return tuple(answers)


def on_rank_launches() -> dict[str, int]:
    device, answers = install(), {}
    for name, (_, attempt) in LAUNCHES.items():
        x = gpu(4)
        with device.counting() as counts:
            attempt(x)
        answers[name] = counts.launches.total()
    return answers


def test_what_cuda_refuses(gpu_ranks):
    answers = gpu_ranks(1, on_rank_refusals, "refused")[0]
    assert [name for name, said in answers.items() if said == "nothing"] == []
    assert "cuda:0 (3,) and cpu (3,), in aten.add.Tensor" in answers["a sum"]


def test_what_cuda_takes(gpu_ranks):
    assert set(gpu_ranks(1, on_rank_refusals, "allowed")[0].values()) == {"nothing"}


def test_what_the_host_waits_for(gpu_ranks):
    waiting, free = gpu_ranks(1, on_rank_waits)[0]
    assert waiting == {name: {name: 1} for name in WAITS}
    assert free == {name: {} for name in FREE}


def test_launches(gpu_ranks):
    """`gpu(2, 2)`, into which a product goes, is a kernel too."""
    expected = {name: count for name, (count, _) in LAUNCHES.items()}
    expected["a product into a result"] += 1
    assert gpu_ranks(1, on_rank_launches)[0] == expected


def on_rank_late() -> tuple[list[float], list[float]]:
    there = torch.arange(3.0, device="cuda")
    here = there.to("cpu", non_blocking=True)
    early = here.tolist()
    torch.cuda.current_stream().synchronize()
    return early, here.tolist()


def test_a_copy_read_before_it_arrives_holds_no_number(gpu_ranks):
    early, late = gpu_ranks(1, on_rank_late)[0]
    assert all(x != x for x in early) and late == [0.0, 1.0, 2.0]


def on_rank_labels() -> tuple[dict, dict]:
    device = install()
    weight = gpu(3).requires_grad_()
    with device.counting() as counts:
        with device.labelled("one"):
            hidden = weight * 2
            with device.labelled("inner"):
                hidden = hidden.exp()
        with device.labelled("two"):
            repeated = torch.utils.checkpoint.checkpoint(
                lambda x: _labelled_exp(device, x), hidden, use_reentrant=False
            )
        repeated.sum().backward()
    sites = {site.partition(":")[0] for site in counts.launches.by("site")}
    return dict(counts.launches.by("label", "backward")), sites


def _labelled_exp(device, x: torch.Tensor) -> torch.Tensor:
    with device.labelled("three"):
        return x.exp()


def test_kernels_of_the_backward_pass_belong_to_the_part_that_made_them(gpu_ranks):
    """The first gradient of a sum is a kernel, too. What is repeated counts as forward."""
    found, sites = gpu_ranks(1, on_rank_labels)[0]
    assert found == {
        ("one", False): 1,
        ("inner", False): 1,
        ("three", False): 2,
        ("other", False): 2,
        ("three", True): 1,
        ("inner", True): 1,
        ("one", True): 1,
    }
    assert sites == {"tests/fake_gpu/test_rules.py"}


def on_rank_repeated() -> list[float]:
    """The gradient through a pass that is repeated and names a device."""
    weight = gpu(3).requires_grad_()

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return (x * torch.arange(3.0, device="cuda")).exp()

    out = torch.utils.checkpoint.checkpoint(scaled, weight, use_reentrant=False)
    torch.autograd.backward(out.sum())
    return weight.grad.tolist()


def test_a_repeated_pass_is_on_the_gpu_too(gpu_ranks):
    expected = [x * math.exp(x) for x in range(3)]
    assert gpu_ranks(1, on_rank_repeated)[0] == pytest.approx(expected)


def on_rank_collectives() -> dict[str, object]:
    """On two ranks; the group of the job is NCCL's, another is gloo's."""
    rank, gloo, device = dist.get_rank(), dist.new_group(backend="gloo"), install()
    attempts = {
        "a CPU tensor": lambda: dist.all_reduce(cpu(2)),
        "not contiguous": lambda: dist.all_reduce(gpu(2, 2).t()[0]),
        "int16": lambda: dist.all_reduce(gpu(2).to(torch.int16)),
    }
    answers: dict[str, object] = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            answers[name] = "nothing"
        except (RuntimeError, TypeError, ValueError) as error:
            answers[name] = str(error)
    summed = gpu(2) * (rank + 1)
    dist.all_reduce(summed)
    parts = [gpu(1), gpu(3)]
    dist.all_gather(parts, parts[rank] * (rank + 5))
    kept = gpu(1 + 2 * rank)
    dist.reduce_scatter(kept, [gpu(1), gpu(3) * 2])
    with device.counting() as counts:
        dist.all_reduce(gpu(2))
        dist.all_reduce(gpu(2), group=gloo)
    answers["waits"] = dict(counts.waits.by("what"))
    sent: list = [None, None]
    dist.all_gather_object(sent, rank)
    answers["sums"] = (summed.tolist(), [p.tolist() for p in parts], kept.tolist(), sent)
    return answers


def test_what_nccl_refuses_and_computes(gpu_ranks):
    """Parts of different lengths too, which NCCL takes and gloo does not. gloo takes tensors of the
    GPU, but the host waits."""
    for rank, answers in enumerate(gpu_ranks(2, on_rank_collectives)):
        sums = answers.pop("sums")
        assert answers.pop("waits") == {"gloo": 1}
        assert [name for name, said in answers.items() if said == "nothing"] == []
        kept = [[2.0], [4.0, 4.0, 4.0]][rank]
        assert sums == ([3.0, 3.0], [[5.0], [6.0, 6.0, 6.0]], kept, [0, 1])


def test_events_are_counted_by_field():
    from tools.fake_gpu import Event

    events = Events({Event("mm", "a", False, "x"): 2, Event("mm", "b", True, "x"): 3})
    assert events.by("what") == {"mm": 5}
    assert events.by("label", "backward") == {("a", False): 2, ("b", True): 3}
    assert events.of(label="b").total() == 3
    assert events.less(Events({Event("mm", "a", False, "x"): 5})).by("label") == {"b": 3}
    assert PARAMETERS not in events.by("label")

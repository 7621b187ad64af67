"""The optimizer's state in model space: every element, one step count each, nothing frozen."""

from __future__ import annotations

import pytest
import torch

from megatron_mm.checkpoint import optimizer_state
from support.checkpoint_runs import create, tiny_run, train

PLAIN = dict(use_distributed_optimizer=False)


def steps_after_restore(run) -> dict:
    engine = create(run)
    train(engine, range(3))
    state = optimizer_state.collect(engine)
    again = create(run, engine.groups)
    optimizer_state.restore(again, state)
    owned = optimizer_state.owned(again).values()
    tensors = [mine.inner.state[mine.main]["step"] for mine in owned]
    found = {
        "owned": len(tensors),
        "objects": len({t.data_ptr() for t in tensors}),
        "restored": {float(t) for t in tensors},
    }
    train(again, range(3, 4))
    found["one later"] = {mine.step for mine in optimizer_state.owned(again).values()}
    return found


@pytest.mark.parametrize(
    ("size", "parallel", "bf16"),
    [(1, {}, False), (2, {}, True), (2, dict(ep=2), False), (1, PLAIN, False), (1, PLAIN, True)],
)
def test_every_parameter_has_a_step_of_its_own(ranks, size, parallel, bf16):
    """Were one tensor shared, Adam would add one to it for every parameter."""
    for found in ranks(size, steps_after_restore, tiny_run(parallel, bf16=bf16)):
        assert found["objects"] == found["owned"] > 5
        assert found["restored"] == {3.0}
        assert found["one later"] == {4}


def collected(run, steps: int) -> dict:
    engine = create(run)
    train(engine, range(steps))
    before = {k: len(m.inner.state) for k, m in optimizer_state.owned(engine).items()}
    state = optimizer_state.collect(engine, chunk=5000)
    assert {k: len(m.inner.state) for k, m in optimizer_state.owned(engine).items()} == before
    trainable = {n: p.detach().clone() for n, p, _ in optimizer_state.trainable(engine)}
    return {"state": state, "params": trainable}


@pytest.mark.parametrize("parallel", [{}, dict(ep=2), PLAIN])
def test_replicas_collect_the_same_whole_parameters(ranks, parallel):
    first, second = ranks(2, collected, tiny_run(parallel), 2)
    for name, param in first["params"].items():
        entry = first["state"][name]
        assert torch.equal(entry["master"], param)
        assert int(entry["step"]) == 2
        split = parallel.get("ep") and ".experts." in name  # other experts on the other rank
        for kind in optimizer_state.KINDS:
            assert entry[kind].shape == param.shape
            assert entry[kind].dtype == torch.float32
            assert torch.equal(entry[kind], second["state"][name][kind]) != bool(split)


def test_before_any_step_moments_are_zero_and_nothing_is_created(ranks):
    (found,) = ranks(1, collected, tiny_run(), 0)
    for entry in found["state"].values():
        assert int(entry["step"]) == 0
        assert not entry["exp_avg"].any()
        assert not entry["exp_avg_sq"].any()


def test_frozen_parameters_have_no_state(ranks):
    (found,) = ranks(1, collected, tiny_run(freeze_vision=True, freeze_router=True), 1)
    assert found["state"].keys() == found["params"].keys()
    assert not any(".router." in name or ".vit." in name for name in found["state"])
    assert any("projector" in name for name in found["state"])


def negative_zero(run) -> bool:
    engine = create(run)
    train(engine, range(1))
    for mine in optimizer_state.owned(engine).values():
        mine.inner.state[mine.main]["exp_avg"].fill_(-0.0)
    state = optimizer_state.collect(engine)
    return all(entry["exp_avg"].signbit().all() for entry in state.values())


def test_gathering_keeps_every_bit(ranks):
    assert ranks(2, negative_zero, tiny_run()) == [True, True]

"""What one layout saved, another reads: whole weights and optimizer state, equal to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from checkpoint_runs import create, load_whole, tiny_run, train, train_and_save
from megatron.core import dist_checkpointing

from megatron_mm.checkpoint import blocks, sharded
from megatron_mm.parallel.layout import layouts

PLAIN = dict(use_distributed_optimizer=False)
LAYOUTS = {
    "1": (1, {}),
    "1 plain": (1, PLAIN),
    "TP2": (2, dict(tp=2, etp=1)),
    "TP2 expert-TP2": (2, dict(tp=2)),
    "PP2": (2, dict(pp=2)),
    "EP2": (2, dict(ep=2)),
    "DP2": (2, {}),
    "TP2xPP2": (4, dict(tp=2, pp=2)),
    "TP2xEP2 expert-TP2": (4, dict(tp=2, ep=2, etp=2)),
    "PP2xEP2": (4, dict(pp=2, ep=2)),
}
PAIRS = [
    ("1", "TP2"),
    ("TP2 expert-TP2", "PP2"),
    ("PP2", "1 plain"),
    ("1", "EP2"),
    ("EP2", "1"),
    ("DP2", "TP2xPP2"),
    ("PP2xEP2", "TP2xEP2 expert-TP2"),
]


def same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """layout -> (folder, whole tensors), saved once."""
    made = {}

    def make(layout):
        if layout not in made:
            size, parallel = LAYOUTS[layout]
            folder = tmp_path_factory.mktemp("saved")
            made[layout] = folder, ranks(size, train_and_save, tiny_run(parallel), folder)[0]
        return made[layout]

    return make


@pytest.mark.parametrize("pair", PAIRS, ids=" to ".join)
def test_another_layout_reads_the_same_tensors(ranks, saved, pair):
    folder, expected = saved(pair[0])
    size, parallel = LAYOUTS[pair[1]]
    state, tensors = ranks(size, load_whole, tiny_run(parallel), folder)[0]
    same(tensors, expected)
    assert state["iteration"] == 2
    # Otherwise equality would say little.
    assert float(expected["step.final_norm.weight"]) == 2
    idle = [k for k, t in expected.items() if k.startswith("exp_avg.") and not t.any()]
    assert all(".looks." in k or "memory_proj" in k for k in idle), "W_o is zero at first"


@pytest.mark.parametrize("layout", ["1", "EP2"])
def test_bf16_main_parameters_reshard_too(ranks, tmp_path, layout):
    expected = ranks(2, train_and_save, tiny_run(bf16=True), tmp_path)[0]
    size, parallel = LAYOUTS[layout]
    _, tensors = ranks(size, load_whole, tiny_run(parallel, bf16=True), tmp_path)[0]
    same(tensors, expected)
    name = "output_layer.weight"
    assert not torch.equal(tensors[f"master.{name}"], tensors[f"weight.{name}"])


def losses_after(run, folder) -> list[float]:
    engine = create(run)
    sharded.load(engine, folder)
    train(engine, range(2, 4))
    return engine.gradient_norm()


def test_training_goes_on_alike_on_another_layout(ranks, saved):
    """Up to rounding: gradients are summed in another order."""
    folder, _ = saved("EP2")
    one = ranks(1, losses_after, tiny_run(), folder)[0]
    other = ranks(2, losses_after, tiny_run(dict(pp=2)), folder)[0]
    assert other == pytest.approx(one, rel=1e-3)


def read_with_megatron_core(folder) -> dict[str, torch.Tensor]:
    return dist_checkpointing.load_plain_tensors(str(folder))


def test_megatron_core_reads_it(ranks, saved):
    """A shape may have one dimension more than the parameter: the two halves of a GLU."""
    folder, expected = saved("TP2 expert-TP2")
    tensors = ranks(1, read_with_megatron_core, folder / "iter_0000002")[0]
    weights = {k.removeprefix("weight."): t for k, t in expected.items() if k[:7] == "weight."}
    assert {k for k in tensors if k.startswith("model.")} == {f"model.{name}" for name in weights}
    for name, tensor in weights.items():
        assert torch.equal(tensors[f"model.{name}"], tensor)


def written_elements(run) -> dict[str, tuple[int, int]]:
    """tensor -> (elements that this rank writes, elements of the whole)."""
    engine = create(run)
    shares = blocks.replicas(engine)
    return {
        name: (0 if any(shares[name]) else param.numel(), math.prod(layout.global_shape))
        for name, param, layout in layouts(engine.inner)
    }


@pytest.mark.parametrize("layout", ["DP2", "TP2xPP2", "TP2xEP2 expert-TP2", "PP2xEP2"])
def test_every_element_is_written_once(ranks, layout):
    """torch's planner would drop a second copy, after all ranks had gathered it."""
    size, parallel = LAYOUTS[layout]
    parts = ranks(size, written_elements, tiny_run(parallel))
    for name in set().union(*parts):
        shares = [part[name] for part in parts if name in part]
        assert sum(mine for mine, _ in shares) == shares[0][1], name
    assert all(sum(mine for mine, _ in part.values()) for part in parts), "work is not shared"

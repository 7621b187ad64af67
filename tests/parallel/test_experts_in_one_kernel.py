"""Experts in one kernel, as on a GPU, on the layouts that share experts: bitwise the loop's."""

from __future__ import annotations

import pytest
import torch

from megatron_mm.config import LoraConfig, RunConfig
from megatron_mm.engine.engine import Engine
from megatron_mm.parallel import groups
from support.batches import microbatch
from support.experts import in_one_kernel, moe_layers
from support.invariance import invariance_run
from support.layouts import parallel_config, step_gradients

LAYOUTS = {
    "one rank": (1, {}),
    "EP2": (2, {"ep": 2}),
    "TP2xEP2 with expert-TP2": (4, {"tp": 2, "ep": 2, "etp": 2}),
    "TP2xPP2xEP2": (4, {"tp": 2, "pp": 2, "ep": 2, "etp": 1}),
}
ADAPTERS = LoraConfig(lora_rank=4, lora_targets=["language"])


def run_of(lora: LoraConfig | None = None) -> RunConfig:
    """A run whose experts have rows of whole 16 bytes even when two ranks share their width."""
    run = invariance_run()
    run.model.language.moe_ffn_hidden_size = 32
    run.lora = lora or run.lora
    return run


@pytest.mark.parametrize(
    "name, lora", [*((name, None) for name in LAYOUTS), ("EP2", ADAPTERS)], ids=str
)
def test_every_gradient_is_the_loops(ranks, name, lora):
    """With adapters the experts are frozen, and gradients pass through them."""
    size, sizes = LAYOUTS[name]
    (loss, found), (expected_loss, expected) = (
        ranks(size, step_gradients, run_of(lora), parallel_config(**sizes), way)[0]
        for way in (None, in_one_kernel)
    )
    assert loss == expected_loss and found.keys() == expected.keys()
    assert any(".experts." in name for name in found) is (lora is None)
    for parameter, value in expected.items():
        assert torch.equal(found[parameter], value), parameter


def on_rank_forbidding(run: RunConfig) -> dict:
    """Logits with experts left out, so that they have no row, both ways."""
    engine = Engine.create(run, groups.build(run.parallel))
    engine.training(False)
    forbidden = {index: torch.arange(6) % 3 == 0 for index in range(4)}
    batch, logits = microbatch(run.model, 1), []
    sizes: list[torch.Tensor] = []
    for prepare in (lambda engine: None, in_one_kernel, lambda engine: watch(engine, sizes)):
        prepare(engine)
        with engine.forbidding(forbidden), torch.no_grad():
            logits.append(engine.chunks[0](batch).logits())
    return {
        "same": torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2]),
        "without rows": [counts[::3].sum().item() for counts in sizes],
        "rows": [int(counts.sum()) > 0 for counts in sizes],
    }


def watch(engine: Engine, sizes: list[torch.Tensor]) -> None:
    for layer in moe_layers(engine):
        groups_of = layer.experts.groups
        layer.experts.groups = lambda counts, rows, groups_of=groups_of: (
            sizes.append(counts) or groups_of(counts, rows)
        )


def test_forbidden_experts_are_groups_without_rows(ranks):
    found = ranks(1, on_rank_forbidding, run_of())[0]
    assert found == {"same": True, "without rows": [0] * 4, "rows": [True] * 4}

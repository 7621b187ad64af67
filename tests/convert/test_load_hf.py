"""Straight into a running model: every layout holds what it would have from a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_mm.checkpoint import sharded
from megatron_mm.config import LoraConfig, ParallelConfig, RunConfig
from megatron_mm.convert.live import load_hf
from megatron_mm.engine.engine import Engine
from megatron_mm.errors import CheckpointError
from megatron_mm.parallel import groups
from support.folders import PATTERN, base_model, save_fused, to_checkpoint, weights

LOOKS = "GE L *E GE J *E"
LAYOUTS = {
    "one rank": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP3, a padded vocabulary": (3, {"tensor_model_parallel_size": 3}),
    "PP2xVPP2": (
        2,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ),
    "TP2xEP2": (
        2,
        {
            "tensor_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
        },
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("hf")
    save_fused(made)
    return made


def run_on(parallel: dict, pattern: str = PATTERN, **training) -> RunConfig:
    layout = ParallelConfig(**parallel)
    run = RunConfig(model=base_model(layout.tensor_model_parallel_size), parallel=layout)
    run.model.hybrid_layer_pattern = pattern
    if pattern != PATTERN:
        run.model.fusion = replace(run.model.fusion, vision_memory="tiles")
    for key, value in training.items():
        setattr(run.training, key, value)
    return run


def both_ways(folder: Path, out: Path, parallel: dict):
    """(whole tensors after --load-hf, after a conversion and --finetune --load)"""
    to_checkpoint(folder, out, parallel)
    made = groups.build(ParallelConfig(**parallel))
    found = []
    for load in (
        lambda engine: load_hf(engine, folder, {"image_token_id": 95}),
        lambda engine: sharded.load(engine, out, finetune=True),
    ):
        engine = Engine.create(run_on(parallel, seed=99), made)
        load(engine)
        found.append(weights(engine))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_as_by_a_checkpoint(ranks, folder, tmp_path, name):
    size, parallel = LAYOUTS[name]
    if size == 3:
        folder = tmp_path / "hf"
        save_fused(folder, base_model(3))
    live, stored = ranks(size, both_ways, folder, tmp_path / "mega", parallel)[0]
    assert len(stored) > 80 and live.keys() == stored.keys()
    for name, whole in stored.items():
        assert torch.equal(live[name], whole), name
    assert [name for name, whole in stored.items() if not whole.any()] == []


def with_more(folder: Path):
    run = run_on({}, LOOKS)
    run.lora = LoraConfig(lora_rank=2)
    engine = Engine.create(run, groups.build(run.parallel))
    before = {n: p.detach().clone() for n, p in engine.chunks[0].named_parameters()}
    found = load_hf(engine, folder)
    after = dict(engine.chunks[0].named_parameters())
    kept = {name for name, value in before.items() if torch.equal(value, after[name])}
    return found, kept


def test_looks_and_adapters_stay_as_initialised(ranks, folder):
    found, kept = ranks(1, with_more, folder)[0]
    assert kept == set(found.initialized)
    assert any("looks" in n for n in kept) and any("lora" in n for n in kept)
    assert found.notes == {"image_token_id": 95, "tied": False}


def refused(folder: Path, edit, token: int) -> str:
    run = edit(run_on({}))
    engine = Engine.create(run, groups.build(run.parallel))
    before = {n: p.detach().clone() for n, p in engine.chunks[0].named_parameters()}
    with pytest.raises(CheckpointError) as caught:
        load_hf(engine, folder, {"image_token_id": token})
    for name, param in engine.chunks[0].named_parameters():
        assert torch.equal(param, before[name])
    return str(caught.value)


def as_it_is(run: RunConfig) -> RunConfig:
    return run


def other_width(run: RunConfig) -> RunConfig:
    run.model.language.moe_ffn_hidden_size = 32
    return run


def test_another_model_or_token_changes_nothing(ranks, folder):
    said = ranks(1, refused, folder, as_it_is, 94)[0]
    assert "image_token_id is 95 there, 94 in this run's tokenizer" in said
    said = ranks(1, refused, folder, other_width, 95)[0]
    assert "moe_ffn_hidden_size is 28 there and 32 here" in said
    assert json.loads((folder / "config.json").read_text())["image_token_id"] == 95

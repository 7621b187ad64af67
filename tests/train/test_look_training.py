"""Glimpses learn, or not, as their settings say, beside adapters too."""

from __future__ import annotations

from megatron_mm.config import RunConfig
from megatron_mm.engine.optimizer import module_of
from megatron_mm.model.layers.lora import is_adapter
from support.trainers import digits_run, on_rank_change, with_glimpses


def looking_run(scenes, **settings) -> RunConfig:
    return with_glimpses(digits_run(scenes, **settings))


def test_freezing_rates_and_adapters(ranks, look_scenes):
    """`min_scale` follows its schedule and nothing else."""
    adapters = dict(lora_rank=2, lora_targets=["language"], weight_decay=0.0)
    settings = ({}, dict(freeze_avm=True), dict(lr_mult_avm=0.0), adapters)
    frozen = ((), ("avm",), ("avm",), ("language", "experts"))
    runs = [looking_run(look_scenes, **more) for more in settings]
    for changed, still in zip(ranks(1, on_rank_change, *runs)[0], frozen, strict=True):
        assert changed.pop("language.queries.0.min_scale")
        assert sum(module_of(name) == "avm" for name in changed) == 10
        for name, moved in changed.items():
            assert moved == (is_adapter(name) or module_of(name) not in still), name
    assert sum(map(is_adapter, changed)) > 10

"""The costs of config/cost.py equal the FLOPs that the real model computes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_mm.config import cost
from megatron_mm.model.multimodal import build
from support.batches import small_run
from support.samples import pack, sample


def attention_of_all_pairs(query, key, value, attn_mask=None, is_causal=False, enable_gqa=False):
    """torch's counter does not know its CPU kernel; these products it counts."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return (query @ key.transpose(-1, -2)).softmax(-1) @ value


@pytest.fixture(scope="module")
def counted(pg) -> dict[str, int]:
    """FLOPs of one forward pass over a full sample with one image, by module."""
    run = small_run()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention_of_all_pairs)
        with FlopCounterMode(display=False) as counter:
            build(run, pg)[0](pack(run.model, [sample(run.model, 0, (2,), text=9)])).logits()
    counts = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    logits = counts["Global"] - counts["MultimodalModel"]  # outside of every module
    return {name.removeprefix("MultimodalModel."): n for name, n in counts.items()} | {
        "logits": logits
    }


@pytest.fixture(scope="module")
def run():
    run = small_run()
    run.data.seq_length, run.data.max_num_tiles = 22, 2  # those of the sample
    return run


def test_what_is_products_alone_is_exact(counted, run):
    lm, letters = run.model.language, cost.costs(run).letters
    assert counted["language.layers.0.moe"] == letters["E"]
    # Pairs in the future are not counted here, and computed above.
    future = 22 * 21 / 2 * lm.num_attention_heads * lm.kv_channels
    assert counted["language.layers.1.mixer"] == letters["*"] + 4 * future
    width = run.model.fusion.clvr_num_attention_heads * run.model.fusion.clvr_kv_channels
    look = counted["language.looks.0"] - counted["language.looks.0.linear_coordinates"]
    # Nor are patches that a position may not see: the 13 up to the image's end, and 32 patches.
    assert look == letters["L"] - 4 * 13 * 32 * width
    assert counted["vision.vit"] == cost.costs(run).first
    assert counted["logits"] == cost.costs(run).last


def test_the_delta_rule_is_near(counted, run):
    """Its chunks add products inside them and leave out the first state: a fifth either way."""
    projections = sum(counted[f"language.layers.0.mixer.inner.{x}_proj"] for x in ("in", "out"))
    found, expected = counted["language.layers.0.mixer"], cost.costs(run).letters["G"]
    assert projections < found and abs(found / expected - 1) < 0.2

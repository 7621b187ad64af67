"""The probe: the same on every layout, and right on one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_mm.config import RunConfig, token_multiple
from megatron_mm.data.collate import collate
from megatron_mm.data.tiles import image_settings
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.engine.feed import broadcast_batches
from megatron_mm.evaluation.examples import _looks
from megatron_mm.evaluation.probe import probe
from support.grown import with_answers
from support.trainers import LAYOUTS, digits_run, prompts_of, with_two_memories
from support.weights import random_engine

PROBED = ((0, [5, 6, 7]), (2, [9, 10]), (4, [11, 12, 13, 14]))  # question, answer tokens


def on_rank_probe(run: RunConfig, path) -> tuple[dict, dict, bool, int]:
    engine = random_engine(run)
    settings = image_settings(run)
    samples = prompts_of(run, path)
    pad = load_tokenizer(run.data.tokenizer_model).pad_id
    prompts = collate([samples[i] for i, _ in PROBED], settings=settings, pad_id=pad)
    longest = max(len(answer) for _, answer in PROBED)
    answers = torch.tensor([a + [pad] * (longest - len(a)) for _, a in PROBED])
    batch = with_answers(prompts, answers, pad, token_multiple(run))
    lengths = prompts.cu_seqlens.diff().tolist()
    (batch,) = broadcast_batches(engine.groups, [batch])
    looks, routes = probe(engine, batch, lengths, [len(answer) for _, answer in PROBED])
    hooks = sum(len(module._forward_hooks) for module in engine.chunks[0].modules())
    return looks, routes, engine.groups.is_reader, hooks


@pytest.fixture(scope="module")
def one_rank_probe(ranks, scenes, mixed_rows):
    return ranks(1, on_rank_probe, digits_run(scenes, seq_length=512), mixed_rows)[0]


def test_looks_spread_one_whole_over_what_is_visible(one_rank_probe, scenes, mixed_rows):
    looks, _, _, hooks = one_rank_probe
    run = digits_run(scenes, seq_length=512)
    samples = prompts_of(run, mixed_rows)
    assert list(looks) == [0] and len(looks[0]) == len(PROBED) and hooks == 0
    for weights, (number, _) in zip(looks[0], PROBED, strict=True):
        patches = sum(
            len(image.memories["vision"].coordinates_M2) for image in samples[number].images
        )
        assert patches == 36 * len(samples[number].images)  # nine tiles of 2 x 2 patches each
        assert weights.shape[0] == max(len(answer) for _, answer in PROBED)
        assert (weights >= 0).all()
        # A softmax over up to 108 patches, averaged over 4 heads, in fp32.
        sums = weights[:, :patches].sum(-1)
        assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
        assert not weights[:, patches:].any()  # another sample's, or none


@pytest.mark.parametrize("name", ["one rank", "PP2", "CP2"])
def test_each_look_spreads_over_the_memory_that_it_reads(ranks, scenes, mixed_rows, name):
    """The tiles have nine times the patches of the thumbnail."""
    size, sizes = LAYOUTS[name]
    run = with_two_memories(digits_run(scenes, seq_length=512, **sizes))
    found = ranks(size, on_rank_probe, run, mixed_rows)
    ((looks, _, _, _),) = [rank for rank in found if rank[2]]
    samples = prompts_of(run, mixed_rows)
    assert sorted(looks) == [0, 1]
    for pair, patches in ((0, 36), (1, 4)):
        for weights, (number, _) in zip(looks[pair], PROBED, strict=True):
            assert weights.shape[1] == patches * len(samples[number].images)
            sums = weights.sum(-1)
            expected = torch.full_like(sums, float(bool(weights.shape[1])))
            # A softmax over up to 108 patches, averaged over 4 heads, in fp32.
            assert torch.allclose(sums, expected, atol=1e-5)
    # For the report: the first image's patches in reading order, on the grid of each memory.
    number, answer = PROBED[0]
    item, engine = SimpleNamespace(sample=samples[number]), SimpleNamespace(run=run)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    shown = _looks(engine, tokenizer, item, answer, looks, 0)
    assert [(look["memory"], look["grid"]) for look in shown] == [
        ("vision", [6, 6]),
        ("overview", [2, 2]),
    ]
    for look, patches in zip(shown, (36, 4), strict=True):
        assert [len(weights) for weights in look["weights"]] == [patches] * len(answer)
    assert shown[1]["weights"][0] == [round(float(w), 5) for w in looks[1][0][0]]


def test_routes_count_every_choice_of_every_token(one_rank_probe, scenes, mixed_rows):
    _, routes, _, _ = one_rank_probe
    run = digits_run(scenes, seq_length=512)
    samples = prompts_of(run, mixed_rows)
    assert sorted(routes) == [0, 1]
    for counts in routes.values():
        assert counts.shape == (len(PROBED), run.model.language.num_experts)
        expected = [
            run.model.language.moe_router_topk * (len(samples[n].tokens_T) + len(answer))
            for n, answer in PROBED
        ]
        assert counts.sum(-1).tolist() == expected


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n != "one rank"])
def test_the_probe_sees_the_same_on_every_layout(ranks, scenes, mixed_rows, one_rank_probe, name):
    looks, routes, _, _ = one_rank_probe
    size, sizes = LAYOUTS[name]
    run = digits_run(scenes, seq_length=512, **sizes)
    found = ranks(size, on_rank_probe, run, mixed_rows)
    readers = [rank for rank in found if rank[2]]
    assert len(readers) == (2 if name in ("DP2", "EP2") else 1)
    for rank in found:
        if not rank[2]:
            assert rank[:2] == ({}, {})
    for theirs, counts, _, _ in readers:
        assert theirs.keys() == looks.keys() and counts.keys() == routes.keys()
        for pair, per_sample in looks.items():
            for ours, other in zip(per_sample, theirs[pair], strict=True):
                # fp32 through two layers before the look, in another order: 1e-6 measured.
                assert torch.allclose(ours, other, atol=1e-5)
        for layer, table in routes.items():  # no token sits on the fence in this batch
            assert torch.equal(counts[layer], table)

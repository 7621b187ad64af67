"""Prompts with answers behind them are what collating the longer samples gives."""

from __future__ import annotations

import pytest
import torch

from megatron_mm.data.collate import collate
from megatron_mm.data.sample import Sample
from megatron_mm.data.tiles import image_settings
from megatron_mm.data.tokenizer import load_tokenizer
from support.batches import values_of
from support.grown import with_answers
from support.trainers import digits_run, prompts_of


@pytest.mark.parametrize("pad_multiple", [1, 2, 4])
@pytest.mark.parametrize("grown", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("stream", ["thumbnail", "all"])
@pytest.mark.parametrize("chosen", [(0, 1, 2, 3, 4), (1, 4, 2), (3,), (4,)])
def test_with_answers_is_collating_the_longer_samples(
    scenes, mixed_rows, stream, grown, pad_multiple, chosen
):
    run = digits_run(scenes, image_stream=stream, seq_length=512)
    settings = image_settings(run)
    pad = load_tokenizer(run.data.tokenizer_model).pad_id
    samples = [prompts_of(run, mixed_rows)[i] for i in chosen]
    assert [len(s.images) for s in samples] == [(1, 0, 2, 0, 3)[i] for i in chosen]
    answers = torch.arange(7, 7 + len(samples) * grown).view(len(samples), grown)
    found = with_answers(
        collate(samples, settings=settings, pad_id=pad), answers, pad, pad_multiple
    )
    longer = [
        Sample(torch.cat((s.tokens_T, answer)), *[torch.zeros(len(s.tokens_T) + grown)] * 2,
               s.images, s.where)
        for s, answer in zip(samples, answers, strict=True)
    ]  # fmt: skip
    expected = collate(longer, settings=settings, pad_id=pad, pad_multiple=pad_multiple)
    others = values_of(expected)
    assert {f"memories.vision.{part}" for part in ("tiles", "visible_M2")} < others.keys()
    for name, ours in values_of(found).items():
        theirs = others[name]
        if name in ("labels_T", "loss_mask_T"):  # nothing is supervised
            assert not ours.any() and ours.shape == theirs.shape
        elif isinstance(ours, torch.Tensor):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
        else:
            assert ours == theirs, name

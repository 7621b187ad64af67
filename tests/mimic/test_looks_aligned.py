"""Answers that look, read by models that say places as words and by others: characters and skills
are those of the text."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from megatron_mm.data.sample import SampleBuilder
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.earl.alignment import Alignment
from megatron_mm.earl.spans import clauses, token_pieces
from megatron_mm.mimic.text import answer_starts, matching, row_digest, supervised
from support.trainers import digits_run, with_glimpses


@pytest.fixture
def tokenizer(look_scenes):
    return load_tokenizer(look_scenes / "tokenizer.model")


@pytest.fixture
def row(look_scenes) -> dict:
    lines = (look_scenes / "mix.jsonl").read_text().splitlines()
    return next(found for found in map(json.loads, lines) if len(found["looks"]) > 1)


def sample_of(scenes, row, tokenizer, place):
    run = with_glimpses(digits_run(scenes, seq_length=256), place=place)
    return SampleBuilder(run, tokenizer).training(row, "r:1", scenes)


def test_tokens_are_aligned_by_the_text(look_scenes, row, tokenizer):
    """Neither slots nor words that no text spells move a character."""
    hidden, words = (
        sample_of(look_scenes, row, tokenizer, place) for place in ("hidden", "tokens")
    )
    ids = tokenizer.encode(row["messages"][1]["content"])
    pieces = token_pieces(ids, tokenizer)
    expected = [start for start, _ in pieces] + [pieces[-1][1]]
    teacher, student = (answer_starts(sample, tokenizer) for sample in (hidden, words))
    assert teacher.tolist() == expected
    own = [place not in {a - 1 for a in words.added} for place in supervised(words).tolist()]
    own = torch.tensor(own)
    assert student[own].tolist() == expected and len(student) == len(expected) + len(words.added)
    assert matching(student, teacher)[own].tolist() == list(range(len(expected)))
    # The words of a place are matched with its query.
    ask = {place - 1: n for n, place in enumerate(hidden.queries)}
    asks = [n for n, p in enumerate(supervised(hidden).tolist()) if p in ask]
    found = matching(student, teacher)[~own].view(len(asks), -1)
    assert found.tolist() == [[ask] * 3 for ask in asks]


def test_rows_of_other_boxes_are_other_rows(row):
    moved = row | {"looks": [{"box": [0, 0, 0.1, 0.1]}] * len(row["looks"])}
    bare = {key: value for key, value in row.items() if key != "looks"}
    digests = {row_digest(one, "r:1") for one in (row, moved, bare)}
    assert len(digests) == 3


def test_words_have_the_skill_of_their_query(look_scenes, row, tokenizer):
    """As in a completion, where they stand in the text of the span."""
    names = sorted({span["skill"] for span in row["spans"]})
    found = SimpleNamespace(skill_ids=lambda asked, *_: ([names.index(x) for x in asked], 0))
    alignment = Alignment(SimpleNamespace(found=found), clauses, "error")
    sample = sample_of(look_scenes, row, tokenizer, "tokens")
    skill_T = alignment.row_skills(tokenizer, row, "r:1", sample)
    assert len(sample.added) == 3 * len(sample.queries)
    for query in sample.queries:
        skill = int(skill_T[query - 1])
        assert skill >= 0 and skill_T[query - 4 : query].tolist() == [skill] * 4
    # Slots teach nothing, nor does what stands before the answer.
    assert (skill_T[sample.loss_mask_T == 0] == -1).all()

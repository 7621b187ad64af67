"""Looks in rows: queries, slots and labels, boxes, and every wrong row in one line."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from megatron_mm.config import ConfigError, RunConfig
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.collate import collate
from megatron_mm.data.looks import LookTokens
from megatron_mm.data.sample import SampleBuilder
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.errors import DataError
from support.trainers import digits_run, with_glimpses

SLOTS = 4
LOOKS = LookTokens(query_id=7, slot_id=9, slots=2, most=2, min_scale=0.1)


@pytest.fixture
def looking(look_scenes) -> RunConfig:
    return with_glimpses(digits_run(look_scenes))


@pytest.fixture
def builder(looking) -> SampleBuilder:
    return SampleBuilder(looking, load_tokenizer(looking.data.tokenizer_model))


@pytest.fixture
def row(look_scenes) -> dict:
    """A row with two looks at least."""
    lines = (look_scenes / "mix.jsonl").read_text().splitlines()
    return next(found for found in map(json.loads, lines) if len(found["looks"]) > 1)


def changed(row: dict, answer: str | None = None, question: str | None = None, **keys) -> dict:
    made = copy.deepcopy(row) | keys
    if answer is not None:
        made["messages"][1]["content"] = answer
    if question is not None:
        made["messages"][0]["content"] = question
    return made


def test_slots_follow_queries_and_are_not_learnt(builder, row, look_scenes):
    sample = builder.training(row, "r:1", look_scenes)
    tokenizer, tokens = builder.tokenizer, sample.tokens_T.tolist()
    assert len(sample.queries) == len(row["looks"])
    slots = {q + 1 + i for q in sample.queries for i in range(SLOTS)}
    for place, token in enumerate(tokens):
        assert (token == tokenizer.look_id) == (place in sample.queries)
        assert (token == tokenizer.look_context_id) == (place in slots)
    for query in sample.queries:
        learnt = sample.loss_mask_T[query - 1 : query + 1 + SLOTS].tolist()
        # The query is learnt where it is predicted, its slots are not; the last slot predicts.
        assert learnt == [1.0, *[0.0] * SLOTS, 1.0]
    own = [token for place, token in enumerate(tokens) if place not in slots]
    assert tokenizer.decode(own).endswith(row["messages"][1]["content"] + "<|im_end|>")
    assert builder.measure(row, "r:1", look_scenes).tokens == len(tokens)


def test_boxes_are_places(builder, row, look_scenes):
    boxes = [{"image": 0, "box": [0.25, 0.5, 0.5, 0.6]}, None]
    boxes += [{"box": [0, 0, 0.01, 0.01]}] * (len(row["looks"]) - 2)
    sample = builder.training(changed(row, looks=boxes), "r:1", look_scenes)
    assert sample.targets[0] == pytest.approx((0.55, 0.375, 0.25)) and sample.targets[1] is None
    assert all(target[2] == 0.08 for target in sample.targets[2:])  # the smallest window
    batch = collate([sample, sample], settings=builder.settings, pad_id=0, pad_multiple=16)
    shift = len(sample.tokens_T)
    both = [*sample.queries, *(q + shift for q in sample.queries)]
    assert batch.queries.positions_N.tolist() == both
    assert batch.queries.targets_N3[0].tolist() == pytest.approx([0.55, 0.375, 0.25])
    assert batch.queries.targets_N3[1].isnan().all() and isinstance(batch, Microbatch)


def test_a_prompt_has_the_looks_of_answers_before_it(builder, row, look_scenes):
    first = builder.prompt(row, "r:1", look_scenes)
    assert first.queries == () and len(first.targets) == len(row["looks"])
    again = copy.deepcopy(row)
    again["messages"] += [
        {"role": "user", "content": "Again?"},
        {"role": "assistant", "content": "cell 0<look> is 1"},
    ]
    again["looks"] = [*row["looks"], {"box": [0, 0, 0.5, 0.5]}]
    second = builder.prompt(again, "r:1", look_scenes)
    whole = builder.training(row, "r:1", look_scenes)
    nowhere = (None,) * len(row["looks"])  # a prompt's own answers are not learnt
    assert second.queries == whole.queries and second.targets == (*nowhere, (0.25, 0.25, 0.5))
    batch = collate([second, first], settings=builder.settings, pad_id=0)
    assert batch.queries.targets_N3.shape == (len(row["looks"]), 3)
    assert batch.queries.rows_BM3.shape == (2, len(row["looks"]) + 1, 3)
    assert batch.queries.rows_BM3[1, 0].tolist() == pytest.approx(first.targets[0])


@pytest.mark.parametrize("place", ["hidden", "random", "oracle"])
def test_only_learnt_answers_teach_places(look_scenes, row, place):
    """Under oracle the boxes are no lesson but the places themselves."""
    run = with_glimpses(digits_run(look_scenes), place=place)
    builder = SampleBuilder(run, load_tokenizer(run.data.tokenizer_model))
    again = copy.deepcopy(row)
    again["messages"][1]["weight"] = 0
    again["messages"] += [
        {"role": "user", "content": "Again?"},
        {"role": "assistant", "content": "cell 0<look> is 1"},
    ]
    again["looks"] = [*row["looks"], {"box": [0, 0, 0.5, 0.5]}]
    sample = builder.training(again, "r:1", look_scenes)
    known = [target is not None for target in sample.targets]
    assert known == [place == "oracle"] * len(row["looks"]) + [True]


def test_without_glimpses_a_look_is_a_word(builder, row, look_scenes, looking):
    """So the same rows are the control without glimpses; boxes are of no use there."""
    looking.model.fusion.vision_memory = "none"
    plain = SampleBuilder(looking, builder.tokenizer)
    bare = {key: value for key, value in row.items() if key != "looks"}
    sample = plain.training(bare, "r:1", look_scenes)
    assert sample.queries == () and builder.tokenizer.look_id in sample.tokens_T
    assert builder.tokenizer.look_context_id not in sample.tokens_T
    with pytest.raises(DataError, match="nothing uses 1 of the row's"):
        plain.training(row, "r:1", look_scenes)


ENTRY = {"box": [0.0, 0.0, 0.5, 0.5]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question": "<image>cell 3<look>?"}, "message 1 spells the special token <look>"),
        ({"answer": "is <LOOK_CONTEXT>6"}, "message 2 spells the special token <LOOK_CONTEXT>"),
        (
            {"question": "Digit in cell 3?", "images": [], "other_images": [], "looks": None},
            "message 2 has <look> and no image stands before it",
        ),
        ({"answer": "<look>" * 33}, "33 <look> up to message 2, max_queries is 32"),
        ({"looks": [ENTRY]}, "1 entries of 'looks' for"),
        ({"looks": {"box": [0, 0, 1, 1]}}, "'looks' is a dict; write a list of boxes"),
        ({"looks": [[0, 0, 1, 1]]}, "entry 1 of 'looks' must be"),
        ({"looks": [{**ENTRY, "size": 1}]}, "entry 1 of 'looks' must be"),
        ({"looks": [{"image": 1, **ENTRY}]}, "of image 1; the row has 1, counted from 0"),
        ({"looks": [{"image": True, **ENTRY}]}, "of image True"),
        ({"looks": [None, {"box": [0, 0, 1]}]}, r"entry 2 of 'looks' has the box \[0, 0, 1\]"),
        ({"looks": [{"box": [0, 0, 1.2, 1]}]}, "allowed: 4 shares of the image, 0 to 1"),
        ({"looks": [{"box": [0, 0, float("nan"), 1]}]}, "allowed: 4 shares of the image"),
        ({"looks": [{"box": [0, 0, 10**400, 1]}]}, "allowed: 4 shares of the image"),
        ({"looks": [{"box": [0.5, 0, 0.5, 1]}]}, "left and top must be below"),
        ({"looks": [{"box": [0.6, 0, 0.5, 1]}]}, "left and top must be below"),
    ],
)
def test_a_wrong_row_is_one_line(builder, row, look_scenes, change, reason):
    with pytest.raises(DataError, match=f"r:1.*{reason}") as raised:
        builder.training(changed(row, **change), "r:1", look_scenes)
    assert "\n" not in str(raised.value)


def test_a_tokenizer_without_the_tokens_is_one_line(looking, scenes):
    tokenizer = load_tokenizer(scenes / "tokenizer.model")
    with pytest.raises(ConfigError, match="lacks 2 of the 2 tokens that the letter Q needs"):
        SampleBuilder(looking, tokenizer)


def test_expand_and_drawn_are_opposites():
    """A query past the limit, and one that ends a completion, have no slots; a stray slot is a
    word."""
    own = torch.tensor([1, 7, 2, 9, 7, 9, 3, 7, 4, 7])
    stream = LOOKS.expand(own)
    assert stream.tolist() == [1, 7, 9, 9, 2, 9, 7, 9, 9, 9, 3, 7, 4, 7]
    assert torch.equal(stream[LOOKS.drawn(stream)], own)
    assert LOOKS.find(stream).tolist() == [1, 6]
    assert LOOKS.expand(own, before=1).tolist() == [1, 7, 9, 9, 2, 9, 7, 9, 3, 7, 4, 7]
    cut = torch.tensor([1, 7, 9])  # the length limit fell among the slots
    assert cut[LOOKS.drawn(cut)].tolist() == [1, 7] and not len(LOOKS.find(cut))
    assert LOOKS.expand(torch.tensor([1, 7])).tolist() == [1, 7]
    assert not len(LOOKS.expand(own[:0]))

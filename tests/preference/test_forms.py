"""Rows of every form give one pair; rows that are no pair are one line with file and row."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_mm.data.files.parquet import ParquetRows
from megatron_mm.data.files.rows import Rows
from megatron_mm.data.loading.shuffle import RowGroupCache
from megatron_mm.data.sample import SampleBuilder
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.errors import DataError
from megatron_mm.preference.pairs import build_pair, pair_size
from support.pair_runs import said
from support.trainers import digits_run

ASK = "<image>\nHow many 3?"
USER, RIGHT, WRONG = said("user", ASK), said("assistant", "2"), said("assistant", "3 or 4")
IMAGES = ["images/train_000001.png"]
FORMS = {
    "TRL, texts": {"prompt": ASK, "chosen": "2", "rejected": "3 or 4"},
    "TRL, messages": {"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]},
    "TRL, prompt in the sides": {"chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
    "TRL, prompt there too": {"prompt": ASK, "chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
    "TRL, parts": {
        "prompt": [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "\nHow many 3?"}],
            }
        ],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "2"}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "3 or 4"}]}],
    },
    "ms-swift, response": {"messages": [USER, RIGHT], "rejected_response": "3 or 4"},
    "ms-swift, messages": {
        "messages": [USER, RIGHT],
        "rejected_messages": [USER, WRONG],
        "rejected_images": IMAGES,
    },
    "LLaMA-Factory, ShareGPT": {
        "conversations": [{"from": "human", "value": ASK}],
        "chosen": {"from": "gpt", "value": "2"},
        "rejected": {"from": "gpt", "value": "3 or 4"},
    },
    "LLaMA-Factory, OpenAI": {"messages": [USER], "chosen": RIGHT, "rejected": WRONG},
    "LLaMA-Factory, Alpaca": {
        "instruction": "<image>",
        "input": "How many 3?",
        "chosen": "2",
        "rejected": "3 or 4",
    },
    "InternVL": {"question": "How many 3?", "chosen": "2", "rejected": "3 or 4"},
    "InternVL, marked": {"question": ASK, "chosen": "2", "rejected": "3 or 4"},
}


@pytest.fixture
def made(scenes, tmp_path):
    """made(row, ...) -> what each row of a file gives: a pair, or its error."""
    run = digits_run(scenes)
    builder = SampleBuilder(run, load_tokenizer(run.data.tokenizer_model))
    (tmp_path / "images").symlink_to(scenes / "images")

    def build(*rows, suffix="jsonl"):
        path = tmp_path / f"rows.{suffix}"
        if suffix == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            file = Rows(path)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(list(rows)), path)
            file = ParquetRows(path, RowGroupCache())
        found = []
        for index in range(len(file)):
            try:
                row, where = file[index], file.where(index)
                pair = build_pair(builder, row, where, file.folder)
                size = pair_size(builder, row, where, file.folder)
                tokens = sum(len(side.tokens_T) for side in pair)
                assert size == (tokens, sum(len(i.tiles) for i in pair.chosen.images))
                found.append(pair)
            except DataError as error:
                assert "\n" not in str(error)
                found.append(str(error))
        return found

    return build


def same(one, other) -> None:
    for a, b in zip(one, other, strict=True):
        for name in ("tokens_T", "labels_T", "loss_mask_T"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert [image.start for image in a.images] == [image.start for image in b.images]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_gives_one_pair(made, form, suffix):
    (expected,) = made({"messages": [USER], "chosen": "2", "rejected": "3 or 4", "images": IMAGES})
    image = {"image": IMAGES[0]} if form.startswith("InternVL") else {"images": IMAGES}
    (pair,) = made(FORMS[form] | image, suffix=suffix)
    assert not isinstance(pair, str), pair
    same(pair, expected)
    assert len(pair.chosen.images) == 1 and pair.chosen.images[0] is pair.rejected.images[0]


def test_only_the_sides_are_learnt(made):
    """Not an answer of the prompt. Sides may hold several turns, and differ in the last token."""
    history = [said("user", "1 + 1?"), RIGHT]
    (whole,) = made({"prompt": [*history, said("user", "2 + 2?")], "chosen": "4", "rejected": "4."})
    assert [int(side.loss_mask_T.sum()) for side in whole] == [2, 3]
    (factory,) = made(
        {
            "instruction": "2 + 2?",
            "history": [["1 + 1?", "2"]],
            "system": "Be short.",
            "chosen": "4",
            "rejected": "4.",
        }
    )
    added = len(factory.chosen.tokens_T) - len(whole.chosen.tokens_T)
    assert added > 0 and torch.equal(factory.chosen.loss_mask_T[added:], whole.chosen.loss_mask_T)
    (long,) = made(
        {
            "prompt": "2 + 2?",
            "chosen": [said("assistant", "4"), said("user", "Sure?"), said("assistant", "Yes")],
            "rejected": "5",
        }
    )
    (part,) = made({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"})
    assert long.chosen.loss_mask_T.sum() > part.chosen.loss_mask_T.sum()


TEXTS = {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}
BAD = [
    (TEXTS | {"rejected": "2"}, ":1: chosen and rejected are equal; drop the row"),
    (TEXTS | {"rejected": "\n2"}, ":1: chosen and rejected are equal, "),  # the template drops it
    (TEXTS | {"rejected": " "}, ":1: 'rejected' is an empty text; write it or drop the row"),
    (TEXTS | {"chosen": []}, ":1: 'chosen' is an empty list; a pair needs"),
    (TEXTS | {"chosen": 2}, ":1: 'chosen' is a int; write a text, a message or a list"),
    (TEXTS | {"rejected": None}, ":1: 1 sides of a pair (chosen); a pair has 'chosen', or"),
    ({"prompt": "1 + 1?", "rejected": "3"}, ":1: 1 sides of a pair (rejected); a pair has"),
    (TEXTS | {"rejected_response": "3"}, ":1: 3 sides of a pair (chosen, rejected, rejected_resp"),
    (TEXTS | {"question": "1 + 1?"}, ":1: 2 keys for the prompt of a pair (prompt, question)"),
    ({"chosen": "2", "rejected": "3"}, ":1: the prompt is empty; end it with what the sides ans"),
    (TEXTS | {"prompt": [USER, RIGHT]}, ":1: the prompt ends with an answer; end it with what"),
    ({"chosen": [USER, RIGHT], "rejected": [USER]}, ":1: the rejected side is empty; a pair needs"),
    (
        {"chosen": [USER, RIGHT], "rejected": [said("user", "Else?"), WRONG]},
        ":1: the chosen side goes on with a turn of the role 'user'; both sides must begin",
    ),
    (
        {"prompt": "Else?", "chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
        ":1: the sides part at message 2, before the 1 of the prompt end",
    ),
    ({"messages": [USER], "rejected_response": "3"}, ":1: 'messages' ends without the answer"),
    (
        {"messages": [USER, RIGHT], "rejected_response": "3", "images": IMAGES}
        | {"rejected_images": ["images/train_000002.png"]},
        ":1: 1 'rejected_images' are not the 1 'images'; both sides of a pair must show the same",
    ),
    (
        {"conversations": [{"from": "observation", "value": "5"}], "chosen": "2", "rejected": "3"},
        ":1: turn 1 of 'conversations' is from 'observation' with the keys from, value; allowed:",
    ),
    (TEXTS | {"rejected": "3" * 300}, ":1 (rejected): 3"),  # and the next, over the length
    (TEXTS | {"prompt": ASK}, ":1 (chosen): 1 <image> marks but 0 images"),
    (TEXTS | {"rejected": "<image>"}, ":1 (rejected): message 2 of 2: the assistant turn holds"),
    (TEXTS | {"score_chosen": 8}, ":1 (chosen): nothing uses 1 of the row's 2 keys ('score_ch"),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=range(len(BAD)))
def test_a_row_that_is_no_pair_is_one_line(made, row, message):
    (error,) = made(row)
    assert isinstance(error, str) and f"rows.jsonl{message}" in error, error
    if "(rejected): 3" in message:
        assert "tokens, seq_length is 128; shorten the row" in error  # never cut


def test_images_of_later_turns_must_match(made):
    """Marks beyond the prompt would stand at other tokens on the other side."""
    turns = [said("assistant", "2"), said("user", "<image>And here?"), said("assistant", "3")]
    row = {"prompt": ASK, "chosen": turns, "rejected": [said("assistant", "3 or 4"), *turns[1:]]}
    (error,) = made(row | {"images": IMAGES * 2})
    assert ":1 (rejected): its 2 images begin at the tokens" in error

"""Places of looks as words: what they spell, who writes them, and every wrong row in one line."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from megatron_mm.config import ConfigError, RunConfig, validate
from megatron_mm.config.layers.queries import query_settings
from megatron_mm.data.looks import LookTokens, first_place_token
from megatron_mm.data.place_names import PLACE_TOKENS, PLACES, SCALES, without_places
from megatron_mm.data.place_tokens import WORDS, PlaceTokens
from megatron_mm.data.sample import SampleBuilder
from megatron_mm.data.tokenizer import LOOK, load_tokenizer
from megatron_mm.earl.spans import clauses
from megatron_mm.errors import DataError
from megatron_mm.evaluation.scoring import score
from support.trainers import digits_run, with_glimpses

FIRST = 10
PLACE = PlaceTokens(FIRST, 0.08)
SPELLED = "<look_y_19><look_x_29><look_s_3>"


@pytest.fixture
def run(look_scenes) -> RunConfig:
    return with_glimpses(digits_run(look_scenes, seq_length=256), place="tokens")


@pytest.fixture
def builder(run) -> SampleBuilder:
    return SampleBuilder(run, load_tokenizer(run.data.tokenizer_model))


@pytest.fixture
def row(look_scenes) -> dict:
    """A row with two looks at least."""
    lines = (look_scenes / "mix.jsonl").read_text().splitlines()
    return next(found for found in map(json.loads, lines) if len(found["looks"]) > 1)


def answering(row: dict, text: str, **keys) -> dict:
    made = copy.deepcopy(row) | keys
    made["messages"][1]["content"] = text
    return made


@pytest.mark.parametrize(
    ("place", "ids", "means"),
    [
        ((0.0, 0.0, 1.0), (0, 32, 64), (1 / 64, 1 / 64, 1.0)),
        ((1.0, 1.0, 0.08), (31, 63, 69), (63 / 64, 63 / 64, 0.08)),
        ((0.61, 0.92, 0.2), (19, 61, 67), (39 / 64, 59 / 64, 0.08**0.6)),
        ((0.5, 0.25, 0.7), (16, 40, 65), (33 / 64, 17 / 64, 0.08**0.2)),
    ],
)
def test_three_words_are_a_place(place, ids, means):
    """By hand: 32 parts of the image, and sides of equal ratios from 1 to 0.08."""
    found = PLACE.spell(place)
    assert found == [FIRST + number for number in ids] and PLACE.spells(found)
    (said,) = PLACE.said(torch.tensor([found])).tolist()
    assert said == pytest.approx(means, abs=1e-6)
    assert abs(said[0] - place[0]) <= 1 / 64 and abs(said[1] - place[1]) <= 1 / 64
    # Half a step between sides of equal ratios.
    assert 0.08**0.1 <= said[2] / place[2] <= 0.08**-0.1
    assert PLACE.spell(said) == found


def test_all_words_come_back():
    """Each of 32 x 32 x 6 places is spelled as it was said."""
    ranges = (torch.arange(size) for size in (PLACES, PLACES, SCALES))
    every = torch.cartesian_prod(*ranges) + FIRST + torch.tensor([0, PLACES, 2 * PLACES])
    assert [PLACE.spell(place) for place in PLACE.said(every).tolist()] == every.tolist()


@pytest.mark.parametrize(
    "ids",
    [
        (10, 42, 80),  # no side
        (9, 42, 74),  # before the first
        (42, 10, 74),  # x before y
        (10, 10, 74),
        (10, 42, 42),
        (-1, -1, -1),  # nothing stood there
    ],
)
def test_other_words_are_the_whole_image(ids):
    assert not PLACE.spells(ids)
    assert PLACE.said(torch.tensor([ids])).tolist() == [[0.5, 0.5, 1.0]]


def test_one_side_is_the_whole_image_s():
    only = PlaceTokens(FIRST, 1.0)
    assert only.spell((0.5, 0.5, 1.0))[2] == FIRST + 64
    assert only.said(torch.tensor([only.spell((0.5, 0.5, 1.0))]))[0, 2] == 1.0


def test_boxes_become_words(builder, row, look_scenes):
    """They are learnt as any word, stand in no text, and say where the query looks."""
    sample = builder.training(row, "r:1", look_scenes)
    words = builder.looks.words
    tokens = sample.tokens_T.tolist()
    assert len(sample.queries) == len(row["looks"])
    assert len(sample.added) == WORDS * len(sample.queries)
    for query, target, entry in zip(sample.queries, sample.targets, row["looks"], strict=True):
        before = range(query - WORDS, query)
        assert set(before) <= set(sample.added)
        left, top, right, bottom = entry["box"]
        box = (top + bottom) / 2, (left + right) / 2, right - left
        assert [tokens[place] for place in before] == words.spell(box)
        assert target == pytest.approx(box, abs=0.1)
        learnt = sample.loss_mask_T[query - WORDS - 1 : query].tolist()
        assert learnt == [1.0] * (WORDS + 1)  # each where it is predicted, and the query
    drawn = builder.looks.drawn(sample.tokens_T)
    kept = [t for n, t in enumerate(tokens) if drawn[n] and n not in sample.added]
    ends = row["messages"][1]["content"] + "<|im_end|>"
    assert builder.tokenizer.decode(kept).endswith(ends)
    # The last tokens of the text, wherever words and slots stand between them.
    ids = builder.tokenizer.encode(ends)
    assert sample.labels_T[sample.predicting(len(ids))].tolist() == ids
    assert builder.measure(row, "r:1", look_scenes).tokens == len(tokens)


def test_words_of_the_text_are_kept(builder, row, look_scenes):
    text = f"cell 14{SPELLED}{LOOK} is 6"
    sample = builder.training(answering(row, text, looks=[None]), "r:1", look_scenes)
    assert len(sample.queries) == 1 and sample.added == ()
    assert sample.targets[0] == pytest.approx((39 / 64, 59 / 64, 0.08**0.6), abs=1e-6)
    bare = {key: value for key, value in row.items() if key != "looks"}
    again = builder.training(answering(bare, text), "r:1", look_scenes)
    assert torch.equal(again.tokens_T, sample.tokens_T)


def test_a_prompt_has_the_words_of_answers_before_it(builder, row, look_scenes):
    again = copy.deepcopy(row)
    again["messages"] += [
        {"role": "user", "content": "Again?"},
        {"role": "assistant", "content": f"cell 0{LOOK} is 1"},
    ]
    again["looks"] = [*row["looks"], {"box": [0, 0, 0.2, 0.2]}]
    prompt = builder.prompt(again, "r:1", look_scenes)
    whole = builder.training(row, "r:1", look_scenes)
    assert prompt.queries == whole.queries and prompt.targets == whole.targets
    assert builder.prompt(row, "r:1", look_scenes).targets == ()


def test_without_the_key_a_look_is_read_as_generation_reads_it(builder, row, look_scenes):
    """A row that was made of a completion: what stands before a look is its place, or the whole
    image."""
    bare = {key: value for key, value in row.items() if key != "looks"}
    text = f"cell 14{SPELLED}{LOOK} is 6, cell 2{LOOK} is 3"
    sample = builder.training(answering(bare, text), "r:1", look_scenes)
    assert sample.added == () and sample.targets[1] == (0.5, 0.5, 1.0)
    assert sample.targets[0] == pytest.approx((39 / 64, 59 / 64, 0.08**0.6), abs=1e-6)


@pytest.mark.parametrize("looks", [[None], [None, None]])
def test_a_look_at_no_place_is_one_line(builder, row, look_scenes, looks):
    text = f"cell 14{SPELLED}{LOOK} is 6, cell 2{LOOK} is 3"
    with pytest.raises(DataError, match=r"r:1: message 2: <look> number 2 has no box") as raised:
        builder.training(answering(row, text, looks=looks), "r:1", look_scenes)
    assert "\n" not in str(raised.value)


def test_what_is_no_setting_is_one_line(run, scenes):
    query_settings(run.model).query_box_loss_coeff = 1.0
    with pytest.raises(
        ConfigError, match="query_box_loss_coeff is 1.0; allowed: 0 under query_place"
    ):
        validate(run)


def test_a_tokenizer_without_the_words_is_one_line(run):
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    known = dict(tokenizer.special_tokens)
    del tokenizer.special_tokens["<look_x_7>"]
    with pytest.raises(ConfigError, match="lacks 1 of the 70 tokens .* <look_x_7> for example"):
        LookTokens.of(run, tokenizer)
    tokenizer.special_tokens.update(known | {"<look_x_7>": 3})
    with pytest.raises(ConfigError, match="has <look_x_7> at 3, not at "):
        LookTokens.of(run, tokenizer)


def test_the_first_word_is_known(run):
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    first = first_place_token(tokenizer)
    assert tokenizer.decode([first, first + 69]) == PLACE_TOKENS[0] + PLACE_TOKENS[-1]


def test_words_are_no_part_of_an_answer():
    said = f"cell 14{SPELLED}{LOOK} is 6"
    assert without_places(said) == f"cell 14{LOOK} is 6"
    for scorer in ("exact", "per_word", "last_word"):
        for truth in (said, f"cell 14{LOOK} is 6"):  # a row may spell the words, too
            assert score(scorer, said, truth) == 1
    row = {"spans": [{"skill": "ocr", "text": f"cell 14{LOOK} is 6"}]}
    (label,) = clauses(row, said, "r:1")
    assert label.correct and label.stop == len(said)

"""Labelled tokens, from a row's spans and a completion's tokens."""

from random import Random

import pytest

from examples.digits.scenes import DEFAULT_WEIGHTS, DIGITS, PHRASES
from megatron_mm.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_mm.earl.router_reward import label_positions
from megatron_mm.earl.spans import (
    Label,
    answer_labels,
    check_taught,
    load_labeller,
    token_labels,
    token_pieces,
)
from megatron_mm.errors import DataError, RLError
from support.hf_tokenizers import byte_level_tokenizer

TEXTS = ["cell 5 is 6, cell 6 is 8", "total 12, left is cell 3", "été 漢字 🙂 1234567890, 🙂"]


@pytest.fixture(scope="module", params=["sentencepiece", "huggingface"])
def tokenizer(request, tmp_path_factory):
    """The demo's tokenizer, where ", cell " is one token, and a byte-level one like Qwen's."""
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "sentencepiece":
        return train_sentencepiece(TEXTS * 5, folder / "t.model", 448, PHRASES)
    fast = byte_level_tokenizer(TEXTS, 280)
    fast.save_pretrained(folder)
    return load_tokenizer(folder)


def row_of(*spans, **more):
    return {"spans": [{"text": text, "skill": skill} for text, skill in spans], **more}


HOPPED = [("5", "6", "ocr"), ("6", "8", "multihop")]
HOPS = row_of(("cell 5 is 6", "ocr"), ("cell 6 is 8", "multihop"))


def parts(row, text, labeller="clauses"):
    """Returns (text, skill, right) of each label."""
    labels = load_labeller(labeller)(row, text, "a.jsonl:3")
    return [(text[label.start : label.stop], label.skill, label.correct) for label in labels]


def test_clauses_are_compared_with_the_spans_in_order():
    assert parts(HOPS, "cell 5 is 6, cell 6 is 7") == [
        ("cell 5 is 6", "ocr", True),
        ("cell 6 is 7", "multihop", False),
    ]
    assert parts(HOPS, "cell 6 is 8") == [("cell 6 is 8", "ocr", False)]
    assert [p[0] for p in parts(HOPS, "a, b, c")] == ["a", "b"]  # c has no span
    assert parts(HOPS, ", b") == [("b", "multihop", False)]
    assert parts(HOPS, "") == []
    assert parts(row_of(("7", "ocr")), "7") == [("7", "ocr", True)]  # the direct form
    listed = row_of(("3, 4", "count"), ("7", "sum"))
    assert parts(listed, "3, 4, 7") == [("3, 4", "count", True), ("7", "sum", True)]
    assert parts(listed, "3") == [("3", "count", False)]


def test_an_answer_at_once_exercises_the_last_skill():
    steps = [{"text": f"cell {a} is {b}", "skill": s, "value": b} for a, b, s in HOPPED]
    assert parts({"spans": steps}, "8") == [("8", "multihop", True)]
    assert parts({"spans": steps}, "6") == [("6", "multihop", False)]
    assert parts({"spans": steps}, "cell 5 is 6") == [("cell 5 is 6", "ocr", True)]
    assert parts({"spans": steps[:1]}, "6") == [("6", "ocr", True)]
    # The steps of "above cell 5" end with a reading; said at once, it is all of it.
    place = {"text": "above is cell 2", "skill": "spatial", "value": "2"}
    above = {"spans": [place, steps[0]], "skill": "spatial"}
    assert parts(above, "6") == [("6", "spatial", True)]
    assert parts(above | {"skill": "vqa"}, "6") == [("6", "ocr", True)]  # of no span


def test_whole_is_scored_as_in_evaluation():
    row = {"skill": "count", "ground_truth": "3", "scorer": "last_word"}
    assert parts(row, "total 3", "whole") == [("total 3", "count", True)]
    assert parts(row, "total 4", "whole") == [("total 4", "count", False)]
    half = {"skill": "transcribe", "ground_truth": "3 4", "scorer": "per_word"}
    assert parts(half, "3 5", "whole") == [("3 5", "transcribe", False)]


@pytest.mark.parametrize("row", [{}, {"spans": None, "ground_truth": "3"}, {"skill": "ocr"}])
@pytest.mark.parametrize("labeller", ["clauses", "whole"])
def test_rows_without_skills_have_no_labels(row, labeller):
    assert parts(row, "cell 5 is 6", labeller) == []


@pytest.mark.parametrize("labeller", ["clauses", "whole"])
def test_a_skill_is_not_taken_for_a_skill_and_a_form(labeller):
    row = row_of(("3", "math/algebra"), skill="math/algebra", ground_truth="3")
    with pytest.raises(DataError, match="skill 'math/algebra' holds '/', .* 'math-algebra'"):
        parts(row, "3", labeller)


def test_a_rows_own_answer_has_its_spans(tokenizer):
    """Or a clause would be taught as another one's skill."""

    def labelled(answer: str, labeller: str = "clauses"):
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        row = HOPS | {"messages": messages, "skill": "multihop", "ground_truth": "8"}
        using, where = load_labeller(labeller), "a.jsonl:3"
        labels = answer_labels(row, tokenizer, using, where)[1]  # a probe's; some may be wrong
        check_taught(row, labels, using, where)
        return labels

    assert [label.skill for label in labelled("cell 5 is 6, cell 6 is 8")] == ["ocr", "multihop"]
    for answer, clause in (("cell 5 is 6; cell 6 is 8", 1), ("cell 5 is 6, cell 6 is 9", 2)):
        with pytest.raises(DataError, match=f"a.jsonl:3: clause {clause} of its answer is not its"):
            labelled(answer)
    assert not labelled("cell 5 is 6", "whole")[0].correct  # which says nothing of its labels


@pytest.mark.parametrize("key", DEFAULT_WEIGHTS)
def test_the_demos_own_answers_are_right(tokenizer, key):
    rng = Random(4)
    for _ in range(5):
        row = None
        while row is None:
            row = DIGITS.ask(key, [rng.randrange(10) for _ in range(9)], 3, rng)
        ids = [*tokenizer.encode(row["messages"][-1]["content"]), tokenizer.message_end_id]
        labels = token_labels(row, ids, tokenizer, load_labeller("clauses"), "a:1")
        spans, answer = row["spans"], row["messages"][-1]["content"]
        if spans[-1]["text"] not in answer:  # a free question answered at once
            own = [span for span in spans if span["skill"] == row["skill"]] or spans
            spans = [own[-1] | {"text": answer}]
        assert [label.skill for label in labels] == [span["skill"] for span in spans]
        assert all(label.correct for label in labels)
        for label, span in zip(labels, spans, strict=True):
            assert span["text"] in tokenizer.decode(ids[label.start : label.stop])
            # One more token at an end would not be of this span.
            assert span["text"] not in tokenizer.decode(ids[label.start + 1 : label.stop])
            assert span["text"] not in tokenizer.decode(ids[label.start : label.stop - 1])
        # They are spans as the router reward takes them; the stop token is in none.
        numbered = [(start, stop, 0, right) for start, stop, _, right in labels]
        skill, _ = label_positions(len(ids), numbered)
        assert skill[-1] == -1 and (skill == 0).any()


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_texts_of_the_tokens(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = token_pieces(ids, tokenizer)
    assert pieces[0][0] == 0 and pieces[-1][1] == len(text)
    for index in range(len(ids)):
        prefix = tokenizer.decode(ids[: index + 1])
        if not prefix.endswith("\ufffd"):  # else the token ends inside a character
            assert pieces[index][1] == len(prefix)
    covered = {c for start, stop in pieces for c in range(start, stop)}
    assert covered == set(range(len(text)))


def test_tokens_of_one_character_go_together(tokenizer):
    row = row_of(("🙂", "a"), ("漢", "b"))
    ids = tokenizer.encode("🙂, 漢")
    one, two = token_labels(row, ids, tokenizer, load_labeller("clauses"), "a:1")
    assert (one.start, two.stop) == (0, len(ids)) and one.correct and two.correct
    assert tokenizer.decode(ids[: one.stop]) == "🙂"
    assert tokenizer.decode(ids[two.start :]).strip() == "漢"


def test_what_follows_the_stop_has_no_label(tokenizer):
    ids = [*tokenizer.encode("cell 5 is 6"), tokenizer.message_end_id, *tokenizer.encode(", 7")]
    (label,) = token_labels(HOPS, ids, tokenizer, load_labeller("clauses"), "a:1")
    assert label.stop == ids.index(tokenizer.message_end_id) and label.correct
    empty = [tokenizer.message_end_id]
    assert token_labels(HOPS, empty, tokenizer, load_labeller("clauses"), "a:1") == []


def mine(row, text, where, skill="x"):
    return [Label(2, 4, skill, True), Label(0, 2, skill, False)]


def overlapping(row, text, where):
    return [Label(0, 3, "x", True), Label(2, 4, "x", True)]


def test_a_labeller_of_ones_own_is_named_by_its_path(tokenizer):
    labeller = load_labeller("test_spans.mine(skill='y')")
    labels = token_labels({}, tokenizer.encode("1234"), tokenizer, labeller, "a:1")
    assert [(label.skill, label.correct) for label in labels] == [("y", False), ("y", True)]
    with pytest.raises(RLError, match=r"^a:1: a label of characters 2 to 4, the one before ends"):
        labeller = load_labeller("test_spans.overlapping")
        token_labels({}, tokenizer.encode("1234"), tokenizer, labeller, "a:1")
    with pytest.raises(RLError, match=r"^labeller 'paragraphs' is not built in; use one of clau"):
        load_labeller("paragraphs")
    with pytest.raises(RLError, match=r"^labeller no.such cannot be imported"):
        load_labeller("no.such")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"spans": {"text": "x"}}, "a.jsonl:3: 'spans' is a dict; write a list of objects"),
        ({"spans": [{"text": "x"}]}, "a.jsonl:3: span 1 of 1 has no text 'skill'; a span is"),
        ({"spans": [{"text": 3, "skill": "x"}]}, "a.jsonl:3: span 1 of 1 has no text 'text'"),
        ({"spans": ["x"]}, "a.jsonl:3: span 1 of 1 has no text 'text'"),
        ({"skill": 4, "ground_truth": "x"}, "a.jsonl:3: skill 4 is not text"),
        ({"skill": "a", "ground_truth": "x", "scorer": "?"}, "a.jsonl:3: scorer '?' is unknown"),
    ],
)
def test_malformed_rows_are_named(row, words):
    with pytest.raises(DataError) as caught:
        parts(row, "cell", "clauses" if "spans" in row else "whole")
    assert words in str(caught.value) and "\n" not in str(caught.value)

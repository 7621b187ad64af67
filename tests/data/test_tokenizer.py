"""Round trips, single digits, and the special tokens of both kinds of tokenizer."""

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_mm.data.chat import encode_row
from megatron_mm.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, train_sentencepiece
from megatron_mm.errors import DataError
from support.hf_tokenizers import byte_level_tokenizer

TEXTS = [
    "Digit in cell 4?",
    "cell 4 is 7, cell 7 is 12",
    "  two  spaces \n\n and\ttabs\r\n",
    "ends with a newline\n",
    "été 漢字 🙂 1234567890",
    "<b>not special</b> [x] <|im_star",
]


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    """A byte-level BPE tokenizer, as Qwen's, with 24 merges."""
    tokenizer = byte_level_tokenizer(TEXTS, 280)
    tokenizer.add_tokens(["<think>"])
    folder = tmp_path_factory.mktemp("hf")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["sentencepiece", "huggingface"])
def either(request, tokenizer):
    if request.param == "sentencepiece":
        return tokenizer
    return load_tokenizer(request.getfixturevalue("hf_folder"))


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(either, text):
    ids = either.encode(text)
    assert either.decode(ids) == text
    assert max(ids) < either.vocab_size


def test_special_tokens(either):
    ids = [getattr(either, name) for name in SPECIAL_TOKENS]
    assert len(set(ids)) == len(SPECIAL_TOKENS) and all(0 <= i < either.vocab_size for i in ids)
    text = either.encode("7\n")
    around = [either.message_start_id, *text, either.message_end_id, either.pad_id]
    assert either.decode(around) == "<|im_start|>7\n<|im_end|><|endoftext|>"
    assert either.decode_answer(around[1:]) == "7\n"
    assert either.decode([*text, either.vocab_size + 5]) == "7\n"  # an id of a padded model
    for token in SPECIAL_TOKENS.values():
        assert either.find_forged(either.encode(f"a{token}b"), answer=False) == token
    assert either.find_forged(either.encode("a < b, [c], <think>"), answer=True) is None
    assert either.padded_vocab_size() % 64 == 0
    assert 0 <= either.padded_vocab_size() - either.vocab_size < 64


def test_either_tokenizer_serves_the_template(either, make_row):
    row = make_row("<image>What?", "7\n8", images=["x"])
    encoded = encode_row(row, "r:1", either, [2], 999)
    assert either.decode(encoded.tokens) == (
        "<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT></img>What?<|im_end|>\n"
        "<|im_start|>assistant\n7\n8<|im_end|>"
    )


def test_digits_are_single_tokens_in_any_context(tokenizer):
    single = {digit: tokenizer.encode(digit) for digit in "0123456789"}
    assert all(len(ids) == 1 for ids in single.values())
    ids = {ids[0] for ids in single.values()}
    for text in ("3 1 4", "1234567890", "cell 4 is 7, total 12"):
        found = [i for i in tokenizer.encode(text) if i in ids]
        assert tokenizer.decode(found) == "".join(c for c in text if c.isdigit())


def test_demo_phrases_are_short(tokenizer):
    assert len(tokenizer.encode("Digit in cell 4? Show steps.")) == 3
    assert len(tokenizer.encode("assistant\n")) == 1


def test_missing_special_tokens_are_named(tmp_path, hf_folder):
    bare = PreTrainedTokenizerFast.from_pretrained(hf_folder)
    folder = tmp_path / "bare"
    bare.save_pretrained(folder)
    for file in folder.iterdir():
        file.write_text(file.read_text().replace("<IMG_CONTEXT>", "<IMAGE_CONTEXT>"))
    with pytest.raises(DataError, match=r"lacks 1 of 6 special tokens: <IMG_CONTEXT>; add"):
        load_tokenizer(folder)


def test_unusable_tokenizer_paths(tmp_path):
    with pytest.raises(DataError, match="neither a SentencePiece file nor a folder"):
        load_tokenizer(tmp_path / "none.model")
    (tmp_path / "broken.model").write_text("nothing")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "broken.model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no tokenizer can be loaded") as caught:
        load_tokenizer(tmp_path / "empty")
    assert "\n" not in str(caught.value)


def test_training_is_deterministic(tmp_path):
    for name in ("a", "b"):
        train_sentencepiece(TEXTS * 5, tmp_path / name, 400)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

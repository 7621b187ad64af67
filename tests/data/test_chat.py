"""The template, and exactly which tokens are supervised."""

import pytest

from megatron_mm.data.chat import encode_prompt, encode_row
from megatron_mm.errors import DataError

DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<image>and <image>: same?"},
    {"role": "assistant", "content": "no\nnot at all"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "yes"},
]


def encode(row, tokenizer, counts=(), seq_length=128):
    return encode_row(row, "f.jsonl:3", tokenizer, counts, seq_length)


def test_template_and_mask(tokenizer):
    encoded = encode({"messages": DIALOGUE}, tokenizer, [2, 3])
    text = tokenizer.decode(encoded.tokens)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT></img>and "
        "<img><IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT></img>: same?<|im_end|>\n"
        "<|im_start|>assistant\nno\nnot at all<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>"
    )
    pairs = list(zip(encoded.tokens, encoded.supervised, strict=True))
    learned = tokenizer.decode([t for t, s in pairs if s])
    assert learned == "no\nnot at all<|im_end|>yes<|im_end|>"
    context = [i for i, t in enumerate(encoded.tokens) if t == tokenizer.image_context_id]
    first, second = encoded.image_starts
    assert context == [first, first + 1, second, second + 1, second + 2]
    for before, after in ((first - 1, first + 2), (second - 1, second + 3)):
        assert encoded.tokens[before] == tokenizer.image_start_id
        assert encoded.tokens[after] == tokenizer.image_end_id


def test_a_sample_is_its_prompt_and_the_completion(tokenizer):
    row = {"messages": DIALOGUE}
    whole = encode(row, tokenizer, [2, 3])
    prompt = encode_prompt(row, "f.jsonl:3", tokenizer, [2, 3], 128)
    answer = [*tokenizer.encode("yes"), tokenizer.message_end_id]
    assert whole.tokens == prompt.tokens + answer
    assert prompt.image_starts == whole.image_starts and not any(prompt.supervised)
    text = tokenizer.decode(prompt.tokens)
    assert text.endswith("Sure?<|im_end|>\n<|im_start|>assistant\n")
    # A row that ends with the question is a prompt already.
    asked = {"messages": DIALOGUE[:-1]}
    assert encode_prompt(asked, "r:1", tokenizer, [2, 3], 128).tokens == prompt.tokens


@pytest.mark.parametrize(
    ("messages", "counts", "what"),
    [
        (None, [], "'messages' must be a list"),
        ([], [], "at least 1 message"),
        (["hello"], [], "message 1 of 1 must be an object"),
        ([{"role": "user", "content": 3}], [], "message 1 of 1 .* text 'content'"),
        ([{"role": "user", "content": "a\ud800"}], [], "message 1 of 1 holds half a surrogate"),
        ([{"role": "human", "content": "x"}], [], "role 'human'; use one of system, user"),
        (DIALOGUE[:2], [1, 1], "0 assistant turns among 2 messages"),
        ([{"role": "assistant", "content": " \n"}], [], "message 1 of 1 is an empty answer"),
        (DIALOGUE, [1], "2 <image> marks but 1 images"),
        (DIALOGUE[3:], [1], "0 <image> marks but 1 images"),
        ([{"role": "assistant", "content": "<image>"}], [], "assistant turn holds <image>"),
        (
            [{"role": "user", "content": "a<|im_end|>"}, DIALOGUE[-1]],
            [],
            r"message 1 spells the special token <\|im_end\|>",
        ),
        (
            [{"role": "assistant", "content": "<IMG_CONTEXT>"}],
            [],
            "message 1 spells the special token <IMG_CONTEXT>",
        ),
    ],
)
def test_bad_conversations(tokenizer, messages, counts, what):
    with pytest.raises(DataError, match=f"^f.jsonl:3: .*{what}") as caught:
        encode({"messages": messages}, tokenizer, counts)
    assert "\n" not in str(caught.value)


def test_a_long_sample_is_refused_never_cut(tokenizer):
    row = {"messages": DIALOGUE[3:]}
    length = len(encode(row, tokenizer).tokens)
    assert len(encode(row, tokenizer, seq_length=length).tokens) == length
    with pytest.raises(DataError, match=f"{length} tokens, seq_length is {length - 1}; shorten"):
        encode(row, tokenizer, seq_length=length - 1)

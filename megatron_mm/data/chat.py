"""Encodes the messages of a row as token ids: the ChatML template and the loss mask.

A message is `<|im_start|>role\\ncontent<|im_end|>`, with a newline between two messages. A
training sample ends at its last `<|im_end|>`, exactly where generation stops, so a sample is a
prompt plus a completion and nothing else. Each piece of text between two control tokens is encoded
by itself, so a prompt has the same ids with and without its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.errors import DataError

IMAGE_MARK = "<image>"
ROLES = ("system", "user", "assistant")


@dataclass
class Encoded:
    """Token ids of one sample.

    Attributes:
        supervised: whether token t itself is learned, because it is part of an answer.
        image_starts: position of the first context token of each image.
    """

    tokens: list[int] = field(default_factory=list)
    supervised: list[bool] = field(default_factory=list)
    image_starts: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], supervised: bool = False) -> None:
        self.tokens.extend(ids)
        self.supervised.extend([supervised] * len(ids))


def encode_row(
    row: dict[str, Any],
    where: str,
    tokenizer: Tokenizer,
    image_token_counts: Sequence[int],
    seq_length: int,
) -> Encoded:
    """Encodes a whole conversation for training. The content of every assistant turn and its
    `<|im_end|>` are supervised.

    Args:
        where: "file:row", for messages.
        image_token_counts: number of stream tokens of each image.

    Raises:
        DataError: the conversation is malformed, `<image>` marks do not match the images, text
            spells a special token, or the sample has more than `seq_length` tokens.
    """
    messages = check_messages(row, where)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            f"{where}: 0 assistant turns among {len(messages)} messages; "
            "training needs at least 1 answer (in verl's form: as the last message of 'prompt', "
            "or as 'response')"
        )
    encoded = _encode_messages(messages, where, tokenizer, image_token_counts)
    return _check_length(encoded, where, seq_length)


def encode_prompt(
    row: dict[str, Any],
    where: str,
    tokenizer: Tokenizer,
    image_token_counts: Sequence[int],
    seq_length: int,
) -> Encoded:
    """Encodes everything before the last answer, up to and including
    `<|im_start|>assistant\\n`, without supervision. Raises like `encode_row`."""
    messages = check_messages(row, where)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    encoded = _encode_messages(messages, where, tokenizer, image_token_counts)
    if messages:
        encoded.add(tokenizer.encode("\n"))
    encoded.add([tokenizer.message_start_id])
    encoded.add(tokenizer.encode("assistant\n"))
    encoded.supervised = [False] * len(encoded.tokens)
    return _check_length(encoded, where, seq_length)


def check_messages(row: dict[str, Any], where: str) -> list[dict[str, str]]:
    """Returns the messages of a row.

    Raises:
        DataError: names the first malformed message.
    """
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' must be a list of at least 1 message")
    for number, message in enumerate(messages, start=1):
        at = f"{where}: message {number} of {len(messages)}"
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(f"{at} must be an object with a text 'content'")
        if not _is_unicode(message["content"]):
            raise DataError(f"{at} holds half a surrogate pair (\\ud800 to \\udfff); remove it")
        role = message.get("role")
        if role not in ROLES:
            raise DataError(f"{at} has role {role!r}; use one of {', '.join(ROLES)}")
        if role == "assistant" and not message["content"].strip():
            raise DataError(f"{at} is an empty answer; write the answer or drop the row")
    return messages


def _encode_messages(
    messages: list[dict[str, str]],
    where: str,
    tokenizer: Tokenizer,
    image_token_counts: Sequence[int],
) -> Encoded:
    for message in messages:
        if message["role"] != "user" and IMAGE_MARK in message["content"]:
            raise DataError(
                f"{where}: a {message['role']} turn holds {IMAGE_MARK}; only user turns may"
            )
    marks = sum(message["content"].count(IMAGE_MARK) for message in messages)
    if marks != len(image_token_counts):
        raise DataError(
            f"{where}: {marks} {IMAGE_MARK} marks but {len(image_token_counts)} images; "
            "write one mark for each image"
        )
    encoded = Encoded()
    for turn, message in enumerate(messages):
        answer = message["role"] == "assistant"
        if turn:
            encoded.add(tokenizer.encode("\n"))
        encoded.add([tokenizer.message_start_id])
        encoded.add(tokenizer.encode(message["role"] + "\n"))
        for piece, text in enumerate(message["content"].split(IMAGE_MARK)):
            if piece:
                count = image_token_counts[len(encoded.image_starts)]
                encoded.image_starts.append(len(encoded.tokens) + 1)
                encoded.add([tokenizer.image_start_id])
                encoded.add([tokenizer.image_context_id] * count)
                encoded.add([tokenizer.image_end_id])
            special = tokenizer.find_special(text)
            if special is not None:
                raise DataError(
                    f"{where}: message {turn + 1} spells the special token {special}; "
                    "remove it, the template writes these tokens"
                )
            if text:
                encoded.add(tokenizer.encode(text), supervised=answer)
        encoded.add([tokenizer.message_end_id], supervised=answer)
    return encoded


def _is_unicode(text: str) -> bool:
    # JSON can spell half a character, which no tokenizer can encode.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_length(encoded: Encoded, where: str, seq_length: int) -> Encoded:
    if len(encoded.tokens) > seq_length:
        raise DataError(
            f"{where}: {len(encoded.tokens)} tokens, seq_length is {seq_length}; "
            "shorten the row, use fewer tiles or raise seq_length"
        )
    return encoded

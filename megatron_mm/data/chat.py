"""Encodes the messages of a row as token ids: the ChatML template and the loss mask.

A message is `<|im_start|>role\\ncontent<|im_end|>`, with a newline between two messages. Reasoning,
tools, tool calls and their results are written as Qwen3 reads them. A training sample ends at its
last `<|im_end|>`, exactly where generation stops, so a sample is a prompt plus a completion and
nothing else. `convert/remote/chat_template.jinja` writes the same text for an export.

Text between two control tokens is encoded as one piece, as every tokenizer encodes the whole
prompt. Answers are the exception: what stands before one, `assistant\\n`, is encoded by itself,
because generation starts behind it. Line breaks that begin an answer are dropped: a tokenizer
would merge them with the template's, and no prompt could lead to them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_mm.data.files.forms import from_json, to_json
from megatron_mm.data.messages import (
    IMAGE_MARK,
    Message,
    ToolCall,
    check_messages,
    is_unicode,
)
from megatron_mm.data.tokenizer import LOOK, LOOK_CONTEXT, Tokenizer
from megatron_mm.errors import DataError

if TYPE_CHECKING:  # it imports torch, which reward workers do without
    from megatron_mm.data.looks import RowLooks

# The words that Qwen3's models were trained to read tools by.
TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    'within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, '
    '"arguments": <args-json-object>}\n</tool_call>'
)


@dataclass(frozen=True)
class Turn:
    """One turn of the template.

    Attributes:
        texts: between each two of them stands an image.
        learnt: whether its text and `<|im_end|>` are supervised.
        source: names the part of the row that it was written from, for messages.
    """

    role: str
    texts: tuple[str, ...]
    learnt: bool
    source: str


@dataclass
class Encoded:
    """Token ids of one sample.

    Attributes:
        supervised: whether token t itself is learned, because it is part of an answer.
        image_starts: position of the first context token of each image.
        queries: position of each query token (data/looks.py); its slots follow.
        added: positions of the words that say where a query looks and are not in the text.
    """

    tokens: list[int] = field(default_factory=list)
    supervised: list[bool] = field(default_factory=list)
    image_starts: list[int] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)
    added: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], supervised: bool = False) -> None:
        self.tokens.extend(ids)
        self.supervised.extend([supervised] * len(ids))


def encode_row(
    row: dict[str, Any],
    where: str,
    tokenizer: Tokenizer,
    image_token_counts: Sequence[int],
    seq_length: int,
    looks: RowLooks | None = None,
) -> Encoded:
    """Encodes a whole conversation for training. Every assistant turn and its `<|im_end|>` are
    supervised, unless its `weight` is 0 or its `loss` false.

    Args:
        where: "file:row", for messages.
        image_token_counts: number of stream tokens of each image.
        looks: None for a model without glimpses.

    Raises:
        DataError: the conversation is malformed, `<image>` marks do not match the images, text
            spells a control token, nothing is learnt, a `<look>` has no image before it or is one
            too many, or the sample has more than `seq_length` tokens.
    """
    messages = check_messages(row, where)
    answers = sum(message.role == "assistant" for message in messages)
    if not answers:
        raise DataError(
            f"{where}: 0 assistant turns among {len(messages)} messages; "
            "training needs at least 1 answer (in verl's form: as the last message of 'prompt', "
            "or as 'response')"
        )
    if not any(message.learnt for message in messages):
        raise DataError(
            f"{where}: 0 of {answers} assistant turns are learnt; set the weight or loss of one"
        )
    written = turns(messages, tools_of(row, where))
    encoded = _encode(written, where, tokenizer, image_token_counts, looks)
    return _check_length(encoded, where, seq_length)


def encode_prompt(
    row: dict[str, Any],
    where: str,
    tokenizer: Tokenizer,
    image_token_counts: Sequence[int],
    seq_length: int,
    looks: RowLooks | None = None,
) -> Encoded:
    """Encodes everything before the last answer, up to and including
    `<|im_start|>assistant\\n`, without supervision. Raises like `encode_row`."""
    messages = check_messages(row, where)
    if messages[-1].role == "assistant":
        messages = messages[:-1]
    before = turns(messages, tools_of(row, where))
    encoded = _encode(before, where, tokenizer, image_token_counts, looks)
    if before:
        encoded.add(tokenizer.encode("\n"))
    encoded.add([tokenizer.message_start_id])
    encoded.add(tokenizer.encode("assistant\n"))
    encoded.supervised = [False] * len(encoded.tokens)
    return _check_length(encoded, where, seq_length)


def tools_of(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Returns the tools that a row offers: a list of objects, or its JSON.

    Raises:
        DataError: it is neither.
    """
    tools = from_json(row.get("tools"), "tools", where)
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: 'tools' must be a list of objects, or such a list as JSON text")
    if not is_unicode(to_json(tools, "tools", where)):
        raise DataError(f"{where}: 'tools' holds half a surrogate pair (\\ud800 to \\udfff)")
    return tools


def turns(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[Turn]:
    """Returns the turns that the template writes: tools as a part of the system's turn, the
    results of tools as a turn of the user's."""
    found: list[Turn] = []
    after_tool = False
    if tools:
        listed = [json.dumps(tool, ensure_ascii=False) for tool in tools]
        text = "\n".join([TOOLS_BEFORE, *listed]) + TOOLS_AFTER
        if messages and messages[0].role == "system":
            text = messages[0].text + "\n\n" + text
        found.append(Turn("system", (text,), False, "the tools"))
    for number, message in enumerate(messages, start=1):
        source = f"message {number}"
        if message.role == "tool":
            text = f"<tool_response>\n{message.text}\n</tool_response>"
            if after_tool:
                text = found.pop().texts[0] + "\n" + text
            found.append(Turn("user", (text,), False, source))
        elif message.role == "assistant":
            found.append(Turn("assistant", (answer_text(message),), message.learnt, source))
        elif not (tools and number == 1 and message.role == "system"):
            found.append(Turn(message.role, message.texts, False, source))
        after_tool = message.role == "tool"
    return found


def answer_text(message: Message) -> str:
    """Returns the text of an assistant's turn: reasoning, content, tool calls."""
    content = text = _without_leading_breaks(message.text)
    if message.reasoning is not None:
        reasoning, content = message.reasoning.strip("\n"), message.text
        text = f"<think>\n{reasoning}\n</think>\n\n" + content.lstrip("\n")
    calls = "\n".join(_call(call) for call in message.tool_calls)
    return text + ("\n" if content and calls else "") + calls  # reasoning ends with its own breaks


def _call(call: ToolCall) -> str:
    name = json.dumps(call.name, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {call.arguments}}}\n</tool_call>'


def _without_leading_breaks(text: str) -> str:
    """Drops the whitespace that begins a text, up to its last line break."""
    rest = text.lstrip()
    return text[: len(text) - len(rest)].split("\n")[-1] + rest


def _encode(
    written: Sequence[Turn],
    where: str,
    tokenizer: Tokenizer,
    image_token_counts: Sequence[int],
    looks: RowLooks | None,
) -> Encoded:
    marks = sum(len(turn.texts) - 1 for turn in written)
    if marks != len(image_token_counts):
        raise DataError(
            f"{where}: {marks} {IMAGE_MARK} marks but {len(image_token_counts)} images; "
            "write one mark for each image"
        )
    encoded = Encoded()
    for number, turn in enumerate(written):
        if number:
            encoded.add(tokenizer.encode("\n"))
        encoded.add([tokenizer.message_start_id])
        before = turn.role + "\n"
        if turn.role == "assistant":
            encoded.add(tokenizer.encode(before))
            before = ""
        for piece, text in enumerate(turn.texts):
            if piece:
                count = image_token_counts[len(encoded.image_starts)]
                encoded.image_starts.append(len(encoded.tokens) + 1)
                encoded.add([tokenizer.image_start_id])
                encoded.add([tokenizer.image_context_id] * count)
                encoded.add([tokenizer.image_end_id])
            text = text if piece else before + text
            try:
                ids = tokenizer.encode(text) if text else []
            except ValueError as error:
                raise DataError(f"{where}: {turn.source} cannot be encoded: {error}") from None
            forged = tokenizer.find_forged(ids, answer=turn.role == "assistant")
            if forged is not None:
                raise DataError(
                    f"{where}: {turn.source} spells the special token {forged}; "
                    "remove it, the template writes these tokens"
                )
            if looks is None:
                encoded.add(ids, supervised=turn.learnt)
            else:
                _add_with_looks(encoded, ids, turn, where, looks)
        encoded.add([tokenizer.message_end_id], supervised=turn.learnt)
    return encoded


def _add_with_looks(
    encoded: Encoded, ids: Sequence[int], turn: Turn, where: str, looks: RowLooks
) -> None:
    """Adds the ids of a text, the slots behind each query and, if it is said in words, its place
    before it. A query and its place are learnt as any word; its slots are given."""
    tokens = looks.tokens
    asks = tokens.query_id in ids
    if tokens.slot_id in ids or (asks and turn.role != "assistant"):
        spelt = LOOK if asks and turn.role != "assistant" else LOOK_CONTEXT
        raise DataError(
            f"{where}: {turn.source} spells the special token {spelt}; remove it, "
            f"only answers ask for looks, with {LOOK}"
        )
    if asks and not encoded.image_starts:
        raise DataError(
            f"{where}: {turn.source} has {LOOK} and no image stands before it; show one first"
        )
    for place, index in enumerate(ids):
        if index == tokens.query_id:
            number = len(encoded.queries)
            words = looks.words(number, ids[:place], f"{where}: {turn.source}")
            begin = len(encoded.tokens)
            encoded.added += range(begin, begin + len(words))
            encoded.add(words, supervised=turn.learnt)
            encoded.queries.append(len(encoded.tokens))
        encoded.add([index], supervised=turn.learnt)
        if index == tokens.query_id:
            encoded.add([tokens.slot_id] * tokens.slots)
    if len(encoded.queries) > tokens.most:
        raise DataError(
            f"{where}: {len(encoded.queries)} {LOOK} up to {turn.source}, max_queries is "
            f"{tokens.most}; ask less often or raise max_queries"
        )


def _check_length(encoded: Encoded, where: str, seq_length: int) -> Encoded:
    if len(encoded.tokens) > seq_length:
        raise DataError(
            f"{where}: {len(encoded.tokens)} tokens, seq_length is {seq_length}; "
            "shorten the row, use fewer tiles or raise seq_length"
        )
    return encoded

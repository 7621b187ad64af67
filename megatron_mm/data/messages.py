"""Checks the messages of a row: who speaks, texts and images, tool calls, and what is learnt.

Every key of a message is used or rejected, so that a conversation never trains on less than it
says. The keys are those of OpenAI's and Hugging Face's chat format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_mm.data.files.forms import from_json, to_json
from megatron_mm.errors import DataError

IMAGE_MARK = "<image>"
ESCAPED_MARK = "\\<image>"  # the text "<image>", which stands for no image
ROLES = ("system", "user", "assistant", "tool")
KEYS = {
    "system": ("role", "content", "loss"),
    "user": ("role", "content", "loss"),
    "assistant": ("role", "content", "reasoning_content", "tool_calls", "weight", "loss"),
    "tool": ("role", "content", "tool_call_id", "name", "loss"),
}
# Keys of other formats, by what to write in their place.
INSTEAD = {
    "reasoning": "write it as 'reasoning_content'",
    "thinking": "write it as 'reasoning_content'",
    "function_call": "write it as 'tool_calls'",
    "images": "list the images of all messages under the row's key 'images'",
    "image": "list the images of all messages under the row's key 'images'",
    "tools": "move it to the row's key 'tools'",
    "train": "write it as 'loss'",
    "loss_scale": "write 'weight': 0 or 1",
}


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool by the assistant. `arguments` is JSON text."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        texts: the content's texts; between each two of them stands an image.
        learnt: whether it is an answer that training learns.
    """

    role: str
    texts: tuple[str, ...] = ("",)
    learnt: bool = False
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def text(self) -> str:
        """The content without its images."""
        return "".join(self.texts)


def check_messages(row: Mapping[str, Any], where: str) -> list[Message]:
    """Returns the messages of a row.

    Args:
        where: "file:row", for messages.

    Raises:
        DataError: names the first malformed message.
    """
    given = row.get("messages")
    if not isinstance(given, list) or not given:
        raise DataError(f"{where}: 'messages' must be a list of at least 1 message")
    messages: list[Message] = []
    called: dict[str, str] = {}  # the names of tools by the ids of their calls
    for number, message in enumerate(given, start=1):
        at = f"{where}: message {number} of {len(given)}"
        messages.append(_message(message, at))
        called |= {call.id: call.name for call in messages[-1].tool_calls if call.id is not None}
        if messages[-1].role == "tool":
            _check_answered(message, called, at)
    return messages


def _message(message: Any, at: str) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{at} must be an object with a text 'content'")
    # In parquet every message has the keys of all.
    message = _object(message)
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"{at} has role {role!r}; use one of {', '.join(ROLES)}")
    for key in message:
        if key not in KEYS[role]:
            instead = INSTEAD.get(
                key, f"a message of the role {role} may have {', '.join(KEYS[role])}"
            )
            raise DataError(f"{at} has the key {key!r}, which nothing here uses; {instead}")
    calls = _tool_calls(message.get("tool_calls"), at)
    content = message.get("content", "" if calls else None)
    texts = _texts(content, role == "user", at)
    if len(texts) > 1 and role != "user":
        raise DataError(
            f"{at}: the {role} turn holds {IMAGE_MARK}; only user turns may, the text is written "
            f"{ESCAPED_MARK}"
        )
    reasoning = message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise DataError(f"{at}: 'reasoning_content' is a {type(reasoning).__name__}; write text")
    for text in (*texts, reasoning or "", *(call.name + call.arguments for call in calls)):
        if not is_unicode(text):
            raise DataError(f"{at} holds half a surrogate pair (\\ud800 to \\udfff); remove it")
    if role == "assistant" and not ("".join(texts).strip() or (reasoning or "").strip() or calls):
        raise DataError(f"{at} is an empty answer; write the answer or drop the row")
    return Message(role, texts, _learnt(message, role, at), reasoning, calls)


def _object(value: Any) -> dict[str, Any]:
    """Returns an object's keys that have a value; none of anything else."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else {}


def _texts(content: Any, user: bool, at: str) -> tuple[str, ...]:
    """Returns the texts around the images of a message's content: text with marks, or a list of
    parts of the types `text` and `image`."""
    if isinstance(content, str):
        # Split at the escaped marks first: what is left are images.
        pieces = [piece.split(IMAGE_MARK) for piece in content.split(ESCAPED_MARK)]
        texts = pieces[0]
        for piece in pieces[1:]:
            texts = [*texts[:-1], texts[-1] + IMAGE_MARK + piece[0], *piece[1:]]
        return tuple(texts)
    if not isinstance(content, list):
        raise DataError(f"{at} must be an object with a text 'content'")
    texts, marked = [""], 0
    for number, part in enumerate(content, start=1):
        part = _object(part)
        if part.get("type") == "text" and isinstance(part.get("text"), str) and len(part) == 2:
            texts[-1] += part["text"]
            marked = marked or (number if IMAGE_MARK in part["text"] else 0)
        elif part == {"type": "image"} and user:
            texts.append("")
        elif part.get("type") == "image" and user:
            raise DataError(
                f"{at}: part {number} names its image; list it under the row's key 'images' and "
                "write {'type': 'image'}"
            )
        else:
            allowed = "{'type': 'text', 'text': ...}" + (" and {'type': 'image'}" * user)
            raise DataError(f"{at}: part {number} of its content is none of {allowed}")
    if marked and len(texts) > 1:
        raise DataError(
            f"{at}: part {marked} holds {IMAGE_MARK} beside {len(texts) - 1} parts of the type "
            "image; drop the mark, which is plain text in a part"
        )
    return tuple(texts)


def _tool_calls(calls: Any, at: str) -> tuple[ToolCall, ...]:
    calls = from_json(calls, "tool_calls", at)
    if calls is None:
        return ()
    if not isinstance(calls, list):
        raise DataError(f"{at}: 'tool_calls' is a {type(calls).__name__}; write a list")
    return tuple(_tool_call(call, f"{at}: tool call {n}") for n, call in enumerate(calls, start=1))


def _tool_call(call: Any, at: str) -> ToolCall:
    outer = _object(call)
    inner = _object(outer.get("function", outer))
    known = {"id", "type", "index", "function"} if "function" in outer else {"name", "arguments"}
    name, arguments = inner.get("name"), inner.get("arguments", {})
    if not isinstance(name, str) or {*outer} - known or {*inner} - {"name", "arguments"}:
        raise DataError(
            f"{at} must be {{'type': 'function', 'function': {{'name': ..., 'arguments': ...}}}}"
        )
    if outer.get("type", "function") != "function":
        raise DataError(f"{at} is of type {outer['type']!r}; allowed: 'function'")
    given = isinstance(arguments, str)
    text = arguments if given else to_json(arguments, "arguments", at)
    held = from_json(text, "arguments", at)
    if not isinstance(held, dict):
        raise DataError(f"{at}: 'arguments' is a {type(held).__name__}; write an object")
    if not isinstance(outer.get("id", ""), str):
        raise DataError(f"{at}: 'id' is a {type(outer['id']).__name__}; write text")
    return ToolCall(name, text, outer.get("id"))


def _check_answered(message: Mapping[str, Any], called: Mapping[str, str], at: str) -> None:
    """Checks that a tool's answer belongs to a call before it."""
    key, name = message.get("tool_call_id"), message.get("name")
    if not isinstance(key, (str, type(None))):
        raise DataError(f"{at}: 'tool_call_id' is a {type(key).__name__}; write text")
    if key is not None and called and key not in called:
        raise DataError(f"{at} answers the tool call {key!r}; calls before it: {', '.join(called)}")
    expected = name if key is None else called.get(key, name)
    if name != expected and name is not None:
        raise DataError(f"{at} is of the tool {name!r}, its call {key!r} of {expected!r}")


def _learnt(message: Mapping[str, Any], role: str, at: str) -> bool:
    """Returns whether training learns the message: an answer, unless its weight is 0 or its loss
    false."""
    weight, loss = message.get("weight", 1), message.get("loss", role == "assistant")
    if weight not in (0, 1):
        raise DataError(f"{at} has weight {weight!r}; allowed: 0 and 1")
    if loss not in (0, 1):
        raise DataError(f"{at} has loss {loss!r}; allowed: true and false")
    if loss and role != "assistant":
        raise DataError(f"{at} has the role {role} and loss true; only answers are learnt")
    return bool(weight and loss)


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded."""
    # JSON can spell half a character, which no tokenizer can encode.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

"""TRL's two forms of prompts and completions: a text, or a conversation.

TRL gives a reward function conversations where the data are conversations, and texts elsewhere; a
function is written for one of the two. Here a function gets texts, unless it reads one of them as a
list of messages (`completion[0]["content"]`): then it is called again with messages, and from then
on with messages alone. The texts that it gets note such a reading, even where the function catches
the exception; nothing else about them differs from plain texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex

from megatron_mm.rl.rewards.text import text_of

Messages = list[dict[str, Any]]


class Reading:
    """How the texts of one call were read.

    Attributes:
        as_messages: as lists of messages.
        at_nothing: a position of an empty text was asked for, which tells nothing.
    """

    def __init__(self) -> None:
        self.as_messages = False
        self.at_nothing = False


class Text(str):
    """A text that notes in `reading` when it, or a part of it, is read as a message."""

    reading: Reading

    @classmethod
    def of(cls, text: str, reading: Reading) -> Text:
        made = cls(text)
        made.reading = reading
        return made

    def __getitem__(self, key: SupportsIndex | slice | str) -> Text:
        if isinstance(key, str):
            self.reading.as_messages = True
            raise TypeError(f"string indices must be integers, not {key!r}")
        self.reading.at_nothing |= not self and not isinstance(key, slice)
        return Text.of(super().__getitem__(key), self.reading)

    def __iter__(self) -> Iterator[str]:
        characters = super().__iter__()
        for first in characters:
            yield Text.of(first, self.reading)
            yield from characters

    def __getattr__(self, name: str) -> Any:
        if name in ("get", "keys", "items", "values"):
            self.reading.as_messages = True
        raise AttributeError(f"'str' object has no attribute {name!r}")

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[type, tuple[str]]:
        return str, (str(self),)  # another process gets a plain text


def as_texts(values: Sequence[str | Messages], reading: Reading, empty: str = "") -> list[Text]:
    """Returns the values as texts, `empty` in place of one without characters."""
    return [Text.of(text_of(value) or empty, reading) for value in values]


def as_messages(values: Sequence[str | Messages], role: str) -> list[Messages]:
    """Returns the values as conversations; a text becomes one message of `role`."""
    return [[{"role": role, "content": v}] if isinstance(v, str) else [*v] for v in values]

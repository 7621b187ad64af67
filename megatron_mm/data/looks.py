"""Looks that an answer asks for: a query token in the text, and the slots behind it.

`<look>` in an assistant's text is a query (letter Q of the layer pattern). The model writes it; its
slots, `<LOOK_CONTEXT>`, follow by themselves and show what the glimpse found. So a text, the tokens
of a completion and everything that is measured on them hold queries alone; the stream holds both
(`expand`). Under `query_place: tokens` the words of a place stand before each query
(place_tokens.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_mm.config.layers.queries import QuerySettings, query_settings
from megatron_mm.config.settings import RunConfig
from megatron_mm.data.files.keys import LOOKS
from megatron_mm.data.place_names import PLACE_TOKENS
from megatron_mm.data.place_tokens import WORDS, PlaceTokens
from megatron_mm.data.tokenizer import LOOK, LOOK_CONTEXT, Tokenizer
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.pictures.boxes import Box as Edges
from megatron_mm.pictures.boxes import read_box

Target = tuple[float, float, float]  # y, x, scale in shares of an image


@dataclass(frozen=True)
class LookTokens:
    """
    Attributes:
        query_id, slot_id: of the two tokens.
        slots: behind each query.
        most: queries that a sample may have.
        min_scale: side of the smallest window, as a share of the image's.
        words: that say where a query looks; None: its hidden state says it.
    """

    query_id: int
    slot_id: int
    slots: int
    most: int
    min_scale: float
    words: PlaceTokens | None = None

    @classmethod
    def of(cls, run: RunConfig, tokenizer: Tokenizer) -> LookTokens | None:
        """None for a model without glimpses.

        Raises:
            ConfigError: the tokenizer lacks a token.
        """
        settings = query_settings(run.model)
        if settings is None:
            return None
        found = {LOOK: tokenizer.look_id, LOOK_CONTEXT: tokenizer.look_context_id}
        missing = [token for token, index in found.items() if index is None]
        if missing:
            raise ConfigError(
                f"tokenizer_model {tokenizer.path!r} lacks {len(missing)} of the 2 tokens that the "
                f"letter Q needs: {', '.join(missing)}; add them to it as special tokens, or take "
                "Q and V out of hybrid_layer_pattern"
            )
        assert tokenizer.look_id is not None and tokenizer.look_context_id is not None
        first = first_place_token(tokenizer) if settings.query_place == "tokens" else None
        return cls.known(settings, tokenizer.look_id, tokenizer.look_context_id, first)

    @classmethod
    def known(
        cls, settings: QuerySettings, query_id: int, slot_id: int, place_id: int | None = None
    ) -> LookTokens:
        """
        Args:
            place_id: of the first token of places; None: hidden states say them.
        """
        least = settings.query_min_scale
        words = None if place_id is None else PlaceTokens(place_id, least)
        return cls(query_id, slot_id, settings.slots, settings.max_queries, least, words)

    @property
    def ids(self) -> list[int]:
        """Ids of a query, of its slots and, where words say the place, of the first of these: the
        arguments of `known`."""
        return [self.query_id, self.slot_id, *([] if self.words is None else [self.words.first])]

    def targets(
        self, ids_T: torch.Tensor, queries: Sequence[int], given: Sequence[Target | None]
    ) -> tuple[Target | None, ...]:
        """Returns the places of a sample's queries: those that its words say, or else the given
        ones.

        Args:
            ids_T: the sample's stream.
            queries: where in it they stand.
            given: the place that each should ask for; None: any.
        """
        if self.words is None:
            return tuple(given)
        if not queries:
            return ()
        padded = torch.cat((ids_T.new_full((WORDS,), -1), ids_T))
        before_N3 = torch.stack([padded[place : place + WORDS] for place in queries])
        return tuple((y, x, scale) for y, x, scale in self.words.said(before_N3).tolist())

    def places(self, ids_G: torch.Tensor, before: int = 0) -> torch.Tensor:
        """Returns where each id stands once the slots stand behind the queries, int64 [G].

        Args:
            before: queries that the sample has before these ids; those past `most` are ordinary
                tokens.
        """
        asks_G = ids_G == self.query_id
        asks_G &= asks_G.cumsum(0) + before <= self.most
        earlier_G = asks_G.cumsum(0) - asks_G.long()
        return torch.arange(len(ids_G)) + self.slots * earlier_G

    def expand(self, ids_G: torch.Tensor, before: int = 0) -> torch.Tensor:
        """Returns the ids with the slots behind each query, unless it is the last id."""
        places_G = self.places(ids_G, before)
        whole = ids_G.new_full((int(places_G[-1]) + 1 if len(ids_G) else 0,), self.slot_id)
        whole[places_G] = ids_G
        return whole

    def drawn(self, ids_G: torch.Tensor, before: int = 0) -> torch.Tensor:
        """Returns bool [G], which of a stream's ids are not slots behind a query: the opposite of
        `expand`."""
        found_G = torch.ones(len(ids_G), dtype=torch.bool)
        end = 0  # of the last query's slots
        for place in (ids_G == self.query_id).nonzero().flatten().tolist():
            if place >= end and before < self.most:
                before, end = before + 1, place + 1 + self.slots
                found_G[place + 1 : end] = False
        return found_G

    def find(
        self, ids_G: torch.Tensor, before: int = 0, own_G: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the places in a stream, int64, of the queries that have all of their slots.

        Args:
            before: as in `places`.
            own_G: what `drawn` says, if it is known.
        """
        own_G = self.drawn(ids_G, before) if own_G is None else own_G
        asks_G = own_G & (ids_G == self.query_id)
        asks_G &= asks_G.cumsum(0) + before <= self.most
        places = asks_G.nonzero().flatten()
        return places[places + self.slots < len(ids_G)]


def first_place_token(tokenizer: Tokenizer) -> int:
    """Returns the id of the first of the tokens that say where queries look.

    Raises:
        ConfigError: the tokenizer lacks one, or their ids do not follow each other.
    """
    known = [tokenizer.special_tokens.get(token) for token in PLACE_TOKENS]
    missing = [token for token, index in zip(PLACE_TOKENS, known, strict=True) if index is None]
    if missing:
        raise ConfigError(
            f"tokenizer_model {tokenizer.path!r} lacks {len(missing)} of the {len(PLACE_TOKENS)} "
            f"tokens that query_place tokens needs, {missing[0]} for example; add "
            f"{PLACE_TOKENS[0]} to {PLACE_TOKENS[-1]} to it, in the order of data/place_names.py"
        )
    first = known[0]
    assert first is not None
    if known != list(range(first, first + len(known))):
        wrong = next(n for n, index in enumerate(known) if index != first + n)
        raise ConfigError(
            f"tokenizer_model {tokenizer.path!r} has {PLACE_TOKENS[wrong]} at {known[wrong]}, not "
            f"at {first + wrong}; the {len(known)} tokens of places must follow each other"
        )
    return first


@dataclass(frozen=True)
class Box:
    """The part of an image that a query should ask for.

    Attributes:
        image: its number in the row, from 0.
        edges: left, top, right, bottom in shares of the image as the row shows it.
    """

    image: int
    edges: Edges

    def place(self, min_scale: float) -> Target:
        """Returns (y, x, scale): the centre, and the longer side within what windows can be."""
        left, top, right, bottom = self.edges
        side = max(right - left, bottom - top)
        return (top + bottom) / 2, (left + right) / 2, min(1.0, max(min_scale, side))


def read_boxes(row: Mapping[str, Any], images: int, where: str) -> list[Box | None] | None:
    """Returns the boxes of a row's `looks`: one for each query of its answers in their order, None
    where it says null; None for a row without the key.

    Args:
        images: that the row has.
        where: "file:row", for messages.
    Raises:
        DataError: an entry is no box of one of its images.
    """
    given = row.get(LOOKS)
    if given is None:
        return None
    if not isinstance(given, list):
        raise DataError(f"{where}: {LOOKS!r} is a {type(given).__name__}; write a list of boxes")
    return [_box(entry, n, images, where) for n, entry in enumerate(given, start=1)]


@dataclass(frozen=True)
class RowLooks:
    """How the looks of one row are encoded.

    Attributes:
        tokens: of looks.
        boxes: `read_boxes` of the row.
    """

    tokens: LookTokens
    boxes: Sequence[Box | None] | None = None

    def words(self, number: int, before: Sequence[int], where: str) -> list[int]:
        """Returns the ids to write before a query: the words of its box's place, unless they stand
        there already, or hidden states say it. A row without the key, such as one that was made of
        a completion, is read as generation reads it: the whole image.

        Args:
            number: of the query in its row, from 0.
            before: the ids that stand before it.
            where: "file:row" and turn, for messages.
        Raises:
            DataError: neither its words nor its entry says where it looks.
        """
        words = self.tokens.words
        if words is None or self.boxes is None or words.spells(before[-WORDS:]):
            return []
        box = self.boxes[number] if number < len(self.boxes) else None
        if box is None:
            raise DataError(
                f"{where}: {LOOK} number {number + 1} has no box in {LOOKS!r}, which query_place "
                "tokens needs unless the words of its place stand before it; write one"
            )
        return words.spell(box.place(self.tokens.min_scale))


def targets_of(
    boxes: Sequence[Box | None] | None, queries: int, looks: LookTokens, where: str, *, whole: bool
) -> tuple[Target | None, ...]:
    """Returns the place that each query of a row should ask for; None: any. Those of a prompt come
    first, then those of its answer.

    Args:
        boxes: `read_boxes` of the row.
        queries: that the sample has.
        whole: these are all queries of the row, not those of a prompt.
    Raises:
        DataError: there is not one box for each query.
    """
    if boxes is None:
        return (None,) * queries
    if len(boxes) < queries or (whole and len(boxes) > queries):
        raise DataError(
            f"{where}: {len(boxes)} entries of {LOOKS!r} for {queries} {LOOK} in its answers; "
            "write one for each, null where any place will do"
        )
    return tuple(None if box is None else box.place(looks.min_scale) for box in boxes)


def _box(entry: Any, number: int, images: int, where: str) -> Box | None:
    at = f"{where}: entry {number} of {LOOKS!r}"
    if entry is None:
        return None
    if not isinstance(entry, Mapping) or not {*entry} <= {"image", "box"} or "box" not in entry:
        raise DataError(f"{at} must be {{'image': n, 'box': [left, top, right, bottom]}} or null")
    image = entry.get("image", 0)
    if type(image) is not int or not 0 <= image < images:
        raise DataError(f"{at} is of image {image!r}; the row has {images}, counted from 0")
    return Box(image, read_box(entry["box"], at))

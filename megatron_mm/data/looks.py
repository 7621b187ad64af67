"""Looks that an answer asks for: a query token in the text, and the slots behind it.

`<look>` in an assistant's text is a query (letter Q of the layer pattern). The model writes it; its
slots, `<LOOK_CONTEXT>`, follow by themselves and show what the glimpse found. So a text, the tokens
of a completion and everything that is measured on them hold queries alone; the stream holds both
(`expand`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_mm.config.layers.queries import query_settings
from megatron_mm.config.settings import RunConfig
from megatron_mm.data.tokenizer import LOOK, LOOK_CONTEXT, Tokenizer
from megatron_mm.errors import ConfigError, DataError

LOOKS = "looks"  # the rows' key for the boxes of queries
Target = tuple[float, float, float]  # y, x, scale in shares of an image


@dataclass(frozen=True)
class LookTokens:
    """
    Attributes:
        query_id, slot_id: of the two tokens.
        slots: behind each query.
        most: queries that a sample may have.
        min_scale: side of the smallest window, as a share of the image's.
    """

    query_id: int
    slot_id: int
    slots: int
    most: int
    min_scale: float

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
        return cls(
            tokenizer.look_id,
            tokenizer.look_context_id,
            settings.slots,
            settings.max_queries,
            settings.query_min_scale,
        )

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

    def find(self, ids_G: torch.Tensor, before: int = 0) -> torch.Tensor:
        """Returns the places in a stream, int64, of the queries that have all of their slots.

        Args:
            before: as in `places`.
        """
        own_G = self.drawn(ids_G, before)
        asks_G = own_G & (ids_G == self.query_id)
        asks_G &= asks_G.cumsum(0) + before <= self.most
        places = asks_G.nonzero().flatten()
        return places[places + self.slots < len(ids_G)]


@dataclass(frozen=True)
class Box:
    """The part of an image that a query should ask for.

    Attributes:
        image: its number in the row, from 0.
        edges: left, top, right, bottom in shares of the image.
    """

    image: int
    edges: tuple[float, float, float, float]

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
    image, edges = entry.get("image", 0), entry["box"]
    if type(image) is not int or not 0 <= image < images:
        raise DataError(f"{at} is of image {image!r}; the row has {images}, counted from 0")
    numbers = edges if isinstance(edges, list) else []
    if len(numbers) != 4 or not all(type(x) in (int, float) and 0 <= x <= 1 for x in numbers):
        raise DataError(f"{at} has the box {edges!r:.80}; allowed: 4 shares of the image, 0 to 1")
    left, top, right, bottom = map(float, numbers)
    if left >= right or top >= bottom:
        raise DataError(
            f"{at} has the box {edges}; its left and top must be below its right and bottom"
        )
    return Box(image, (left, top, right, bottom))

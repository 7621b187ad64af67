"""Names of the tokens that say where a query looks, and a text without them; place_tokens.py has
what they mean. Rewards import this in processes that never load torch."""

from __future__ import annotations

import re

PLACES, SCALES = 32, 6
PLACE_TOKENS = (
    *(f"<look_y_{i}>" for i in range(PLACES)),
    *(f"<look_x_{i}>" for i in range(PLACES)),
    *(f"<look_s_{i}>" for i in range(SCALES)),
)
_SPELLED = re.compile("|".join(PLACE_TOKENS))


def without_places(text: str) -> str:
    """Returns a text without the words of places, which are no part of an answer."""
    return _SPELLED.sub("", text)

"""Checks that every key of a row is used, so that none is lost without a word."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from megatron_mm.errors import DataError

USED = (
    *("messages", "tools", "images"),
    *("skill", "form", "ground_truth", "scorer", "spans"),
)
# verl's columns; `forms.py` has taken what the rest of the package needs.
VERL = ("data_source", "ability", "reward_model", "extra_info")
# Keys by which other formats say what a model sees or learns. They are columns of no reward.
MEANT = (
    *("conversations", "conversation", "system", "instruction", "history"),
    *("video", "videos", "audio", "audios", "image_url"),
    *("weight", "loss", "loss_mask", "labels", "chosen", "rejected", "functions"),
)
ANY = "*"


def check_keys(
    row: Mapping[str, Any],
    where: str,
    *,
    more: Iterable[str] = (),
    extra: Iterable[str] = (),
    columns: bool = False,
) -> None:
    """Checks the keys of a row in our form. A key without a value is not there.

    Args:
        more: keys that the run uses besides USED, such as those of a memory's images.
        extra: names of `extra_columns`; "*" allows any.
        columns: whether other keys are used too, as columns of reward functions.

    Raises:
        DataError: names the keys that nothing uses.
    """
    allowed = {*USED, *more, *extra}
    if "data_source" in row or "reward_model" in row:
        allowed |= {*VERL}
    if ANY in allowed:
        return
    unused = [key for key, value in row.items() if value is not None and key not in allowed]
    if columns:
        unused = [key for key in unused if key in MEANT]
    if not unused:
        return
    near = get_close_matches(unused[0], (*USED, *more), 1, 0.8)
    instead = f"did you mean {near[0]!r}? " if near else ""
    raise DataError(
        f"{where}: nothing uses {len(unused)} of the row's {len(row)} keys "
        f"({', '.join(map(repr, unused[:8]))}); {instead}remove them, or name them in extra_columns"
    )

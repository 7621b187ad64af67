"""Checks that every key of a row is used, so that none is lost without a word."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from megatron_mm.errors import DataError

LOOKS = "looks"  # the boxes of queries, in runs of models that glimpse
USED = (
    *("messages", "tools", "images"),
    *("skill", "form", "ground_truth", "scorer", "spans"),
)
# verl's columns; `forms.py` has taken what the rest of the package needs.
VERL = ("data_source", "ability", "reward_model", "extra_info")
# What tools/pass_rate.py adds to a row. Nothing that trains on the row reads it.
RATED = ("accuracy", "completions", "finished", "right", "scores")
# Keys by which other formats say what a model sees or learns. They are columns of no reward.
MEANT = (
    *("conversations", "conversation", "prompt", "system", "system_prompt", "instruction"),
    *("history", "video", "videos", "audio", "audios"),
    *("image_url", "image_path", "image_paths", "imgs"),
    *("weight", "loss", "loss_mask", "labels", "chosen", "rejected", "functions"),
)
ANY = "*"


@lru_cache(maxsize=1024)
def _like(key: str, known: tuple[str, ...]) -> list[str]:
    """The known key that one resembles, in a list, or none. Rows repeat their keys."""
    return get_close_matches(key.lower(), known, 1, 0.8)


def check_keys(
    row: Mapping[str, Any],
    where: str,
    *,
    more: Sequence[str] = (),
    extra: Iterable[str] = (),
    columns: bool = False,
) -> None:
    """Checks the keys of a row in our form. A key with an empty value is not there.

    Args:
        more: keys that the run uses besides USED, such as those of a memory's images.
        extra: names of `extra_columns`; "*" allows any.
        columns: whether other keys are used too, as columns of reward functions; not those that
            say what a model sees or learns, or are nearly one of ours.

    Raises:
        DataError: names the keys that nothing uses.
    """
    allowed = {*USED, *RATED, *more, *extra}
    if "data_source" in row or "reward_model" in row:
        allowed |= {*VERL}
    if ANY in allowed:
        return
    unused = [k for k, v in row.items() if v not in (None, [], {}, "") and k not in allowed]
    near = {key: _like(key, (*USED, *more)) for key in unused}
    if columns:
        unused = [key for key in unused if key in MEANT or near[key]]
    if not unused:
        return
    hint = near[unused[0]]
    instead = f"did you mean {hint[0]!r}? " if hint else ""
    raise DataError(
        f"{where}: nothing uses {len(unused)} of the row's {len(row)} keys "
        f"({', '.join(map(repr, unused[:8]))}); {instead}remove them, or name them in extra_columns"
    )

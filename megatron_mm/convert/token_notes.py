"""Tokens with a meaning of their own: noted with weights, and compared when these are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_mm.checkpoint.plain_pickle import shown
from megatron_mm.config import RunConfig
from megatron_mm.data.looks import LookTokens
from megatron_mm.data.tokenizer import Tokenizer


def token_notes(run: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the part of `HFFolder.notes` that a run's tokenizer knows."""
    looks = LookTokens.of(run, tokenizer)
    found: dict[str, Any] = {"image_token_id": tokenizer.image_context_id}
    return found | ({} if looks is None else {"look_ids": looks.ids})


def differing_token(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """Returns the first token with a meaning of its own that has another id than the weights were
    trained with; None if all have the same.

    Args:
        there: the notes of a folder or a checkpoint; here: `token_notes` of the run's tokenizer.
    """
    for key, mine in here.items():
        its = there.get(key)
        if its is None:
            continue
        pairs = zip(its, mine, strict=False) if isinstance(mine, list) else ((its, mine),)
        if any(a != b for a, b in pairs):  # places in words add one to the ids of looks
            return (
                f"{key} is {shown(repr(its), 100)} there, {mine} in this run's tokenizer; use the "
                "tokenizer that it was trained with"
            )
    return None

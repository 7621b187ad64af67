"""Appends an answer to a prompt."""

from __future__ import annotations

import torch

from megatron_mm.data.looks import LookTokens
from megatron_mm.data.sample import Sample


def answered(prompt: Sample, tokens_G: torch.Tensor, looks: LookTokens | None) -> Sample:
    """Returns the prompt and its completion, whose tokens are supervised; slots stand behind its
    queries, and are not.

    Args:
        tokens_G: int64, of the completion, without slots.
        looks: None for a model without glimpses.
    """
    start, before = len(prompt.tokens_T), len(prompt.queries)
    places_G, queries = torch.arange(len(tokens_G)), prompt.queries
    if looks is not None:
        places_G = looks.places(tokens_G, before)
        tokens_G = looks.expand(tokens_G, before)
        queries += tuple((start + looks.find(tokens_G, before)).tolist())
    tokens_T = torch.cat((prompt.tokens_T, tokens_G))
    targets = (prompt.targets + (None,) * len(queries))[: len(queries)]
    if looks is not None:
        targets = looks.targets(tokens_T, queries, targets)
    mask_T = torch.zeros(len(tokens_T))
    mask_T[start - 1 + places_G] = 1.0
    return Sample(
        tokens_T,
        torch.cat((tokens_T[1:], tokens_T[-1:])),
        mask_T,
        prompt.images,
        prompt.where,
        queries=queries,
        targets=targets,
        slots=prompt.slots,
    )

"""The places that completions have looked at, from all stages of a replica."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_mm.config.layers.queries import query_settings
from megatron_mm.engine.engine import Engine
from megatron_mm.generation.gather import gather_layers
from megatron_mm.generation.lanes import Completion

Looked = list[list[list[float]]]  # of a completion: query, glimpse, (y, x, scale)


def gather_looked(engine: Engine, completions: Sequence[Completion]) -> list[Looked] | None:
    """Returns, on the replica's reader, where each completion looked: for every query the place
    [y, x, scale] of each glimpse, in shares of the image and in the order of the layer pattern;
    elsewhere nothing. None for a model that does not glimpse. Every rank of the replica calls
    it."""
    if query_settings(engine.run.model) is None:
        return None
    pairs = sorted(int(pair) for chunk in engine.chunks for pair in chunk.language.queries)
    whole = gather_layers(engine.groups, completions, pairs, _places)
    return [looked_NQ3.tolist() for looked_NQ3 in whole]


def _places(completion: Completion) -> torch.Tensor:
    assert completion.looked_NQ3 is not None, "a glimpse records where it looks"
    return completion.looked_NQ3

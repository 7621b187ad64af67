"""Where the pairs of side letters stand in a layer pattern.

Weights of a pair are found by its number, so a pair that is added before another one would take its
weights.
"""

from __future__ import annotations

from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.config.pattern import parse_pattern


def pair_places(pattern: str) -> dict[str, list[tuple[int, int]]]:
    """Returns by key (`looks`) where each pair stands: the numbers of base letters before its two
    letters."""
    found: dict[str, list[list[int]]] = {}
    before = 0
    for layer in parse_pattern(pattern):
        if layer.pair is None:
            before += 1
            continue
        pairs = found.setdefault(LAYERS[layer.kind].key, [])
        if layer.pair == len(pairs):
            pairs.append([])
        pairs[layer.pair].append(before)
    return {key: [(opens, closes) for opens, closes in pairs] for key, pairs in found.items()}


def moved_pairs(there: str, here: str) -> list[str]:
    """Returns the pairs of side letters that have a number in two patterns of one base, and not the
    same place: "looks.0 was behind 2 and 4 letters of the base, is behind 1 and 4"."""
    before, now = pair_places(there), pair_places(here)
    return [
        f"{key}.{number} was behind {a[0]} and {a[1]} letters of the base, is behind {b[0]} and "
        f"{b[1]}"
        for key in sorted(before.keys() & now.keys())
        for number, (a, b) in enumerate(zip(before[key], now[key], strict=False))
        if a != b
    ]

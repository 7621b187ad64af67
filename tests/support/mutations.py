"""Seeded damage to bytes and to values of JSON."""

from __future__ import annotations

import random
from typing import Any

NUMBERS = (0, 1, -1, 255, 2**31, 2**32, 2**53, 2**60, 2**63, 2**64, 2**70, 10**30)
TEXTS = ("", "\0", "..", "../x", "/etc/passwd", "\x1b[31m", "\n", "x" * 5000, "é", "torch", "F32")


def damaged(rng: random.Random, content: bytes, pieces: tuple[bytes, ...] = ()) -> bytes:
    """Returns the bytes with one to eight changes: bits, cuts, doublings, zeros, and pieces of the
    format put in or written over."""
    made = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(made) + 1)
        end = min(len(made), at + rng.choice((1, 2, 4, 8, 64, 1000)))
        change = rng.randrange(8)
        if change < 2 and at < len(made):
            made[at] ^= 1 << rng.randrange(8)
        elif change == 2:
            del made[at:end]
        elif change == 3:
            made[at:at] = made[at:end] * rng.choice((1, 1, 3, 50))
        elif change == 4:
            made[at:end] = bytes([rng.choice((0, 255))]) * (end - at)
        elif change == 5:
            made[at:at] = rng.randbytes(rng.choice((1, 2, 8)))
        elif change == 6 and rng.random() < 0.3:
            del made[at:]
        elif pieces:
            piece = rng.choice(pieces)
            made[at : at + rng.choice((0, len(piece)))] = piece
    return bytes(made)


def altered(rng: random.Random, value: Any, chance: float = 0.03) -> Any:
    """Returns a value of JSON in which some parts have become others."""
    if rng.random() < chance:
        return any_value(rng)
    if isinstance(value, dict):
        return {
            (rng.choice(TEXTS) if rng.random() < chance / 3 else key): altered(rng, part, chance)
            for key, part in value.items()
            if rng.random() > chance / 3
        }
    if isinstance(value, list):
        made = [altered(rng, part, chance) for part in value if rng.random() > chance / 3]
        return made * rng.choice((0, 2, 20)) if rng.random() < chance / 3 else made
    if isinstance(value, int) and rng.random() < chance:
        return value + rng.choice((-1, 1, 8))
    return value


def any_value(rng: random.Random, depth: int = 3) -> Any:
    """Returns some value of JSON."""
    kind = rng.randrange(9 if depth else 7)
    if kind < 2:
        return rng.choice(NUMBERS) * rng.choice((1, 1, -1))
    if kind == 2:
        return rng.choice(TEXTS)
    if kind < 7:
        return rng.choice((None, True, False, 0.5, float("nan"), float("inf"), 1e308))
    parts = [any_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return parts if kind == 7 else {rng.choice(TEXTS): part for part in parts}

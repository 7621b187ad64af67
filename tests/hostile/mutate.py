"""Mutations of bytes, text and trees of plain values, drawn by a generator of random numbers."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

EDGES = (0, 1, 0x7F, 0x80, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
TEXTS = (
    *("", " ", "\0", "\n", "\x1b[2J", "\u202e", "\ufeff", "\u2028", "a" * 5000, "９", "\U0010ffff"),
    *(
        "<image>",
        "\\<image>",
        "<|im_end|>",
        "<|im_start|>",
        "\uff1c|im_end|\uff1e",
        "<IMG_CONTEXT>",
    ),
    *("../../etc/passwd", "/dev/zero", "a/../..", "%s%n", "nan", "1e999", "0x" + "f" * 5000),
    *(
        "!!python/object/apply:os.system [id]",
        "${HOME}",
        "$(id)",
        "__class__",
        "[" * 2000,
        "\ud800",
    ),
)
NUMBERS = (
    *(0, -1, 1, 2, 2**31, 2**53 + 1, 2**64, -(2**70), 10**400, 0.5, -0.0, 1e308, 5e-324),
    *(float("nan"), float("inf"), True),
)


def mutated_bytes(rng: Random, data: bytes, most: int = 4) -> bytes:
    """Returns bytes with up to `most` changes: flips, cuts, repeats, edges of numbers, noise."""
    held = bytearray(data)
    for _ in range(rng.randint(1, most)):
        at = rng.randrange(len(held) + 1)
        match rng.randrange(8):
            case 0 if held:
                held[at % len(held)] ^= 1 << rng.randrange(8)
            case 1 if held:
                held[at % len(held)] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                del held[at : at + rng.choice((1, 4, 64, 10**9))]
            case 3:
                held[at:at] = held[at : at + rng.choice((1, 8, 256))] * rng.choice((1, 3, 100))
            case 4:
                width = rng.choice((1, 2, 4, 8))
                number = rng.choice(EDGES) % 256**width
                held[at : at + width] = number.to_bytes(width, rng.choice(("big", "little")))
            case 5:
                held[at:at] = rng.randbytes(rng.choice((1, 16, 300)))
            case 6:
                other = rng.randrange(len(held) + 1)
                held[at : at + 32] = held[other : other + 32]
            case 7:
                held[at:at] = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
    return bytes(held)


def value(rng: Random, depth: int = 2) -> Any:
    """Returns a plain value of any kind, most of them odd."""
    kind = rng.randrange(8)
    if kind < 2:
        return rng.choice(TEXTS)
    if kind < 5:
        return rng.choice(NUMBERS)
    if kind == 5 or depth == 0:
        return None
    parts = [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return parts if kind == 6 else {rng.choice(TEXTS): part for part in parts}


def _nested(rng: Random) -> Any:
    made: Any = 1
    for _ in range(rng.choice((5, 50, 300))):
        made = [made] if rng.random() < 0.5 else {"a": made}
    return made


def mutated_tree(rng: Random, tree: Any, most: int = 3) -> Any:
    """Returns a copy of a tree of dicts and lists with up to `most` of its values replaced,
    removed, renamed, repeated or wrapped."""
    tree = {"root": copy.deepcopy(tree)}
    for _ in range(rng.randint(1, most)):
        places: list[tuple[Any, Any]] = []
        waiting: list[Any] = [tree]
        while waiting:
            node = waiting.pop()
            for key in node if isinstance(node, dict) else range(len(node)):
                places.append((node, key))
                if isinstance(node[key], (dict, list)):
                    waiting.append(node[key])
        node, key = rng.choice(places)
        match rng.randrange(7):
            case 0 | 1:
                node[key] = value(rng)
            case 2 if node is not tree:
                del node[key]
            case 3 if isinstance(node, dict) and node is not tree:
                node[rng.choice(TEXTS)] = node.pop(key)
            case 4:
                node[key] = [node[key]] * rng.choice((1, 2, 50))
            case 5:
                node[key] = _nested(rng)
            case 6 if isinstance(node[key], str):
                text = node[key]
                at = rng.randrange(len(text) + 1)
                node[key] = text[:at] + rng.choice(TEXTS) + text[at:]
    return tree["root"]


def json_bytes(rng: Random, tree: Any) -> bytes:
    """Returns a tree as JSON, now and then with damage."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    data = text.encode("utf-8", "surrogatepass")
    return mutated_bytes(rng, data) if rng.random() < 0.2 else data

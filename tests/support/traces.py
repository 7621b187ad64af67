"""A heavy-tailed trace of (tokens, tiles) per sample; `python tests/support/traces.py` writes it.

Its distribution: text is lognormal, median 300 tokens, sigma 1.2 (the mean is twice the median,
one in a hundred is 16 times it). 55% of the rows hold images: 1 + Pareto(1.6) of them, at most 16,
each of 1 to 13 tiles (dynamic tiling with up to 12 and a thumbnail; 30% are small and stay one
tile). A tile is 256 tokens, an image 2 more; rows beyond 8,192 tokens are drawn again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_mm.data.sample import Size

SEQ_LENGTH = 8192
ROWS = 4096
PATH = Path(__file__).with_name("trace.csv")


def draw(rows: int, seed: int) -> list[Size]:
    """Draws the sizes of `rows` samples."""
    rng, sizes = np.random.default_rng(seed), []
    while len(sizes) < rows:
        tokens, tiles = max(8, int(rng.lognormal(np.log(300), 1.2))), 0
        if rng.random() < 0.55:
            images = min(1 + int(rng.pareto(1.6)), 16)
            chances = [0.3, 0.2, 0.15, 0.15, 0.1, 0.1]
            tiles = int(rng.choice([1, 3, 5, 7, 9, 13], size=images, p=chances).sum())
            tokens += 2 * images + 256 * tiles
        if tokens <= SEQ_LENGTH:
            sizes.append(Size(tokens, tiles))
    return sizes


def read() -> list[Size]:
    """Reads the sizes that are stored in the repository."""
    lines = PATH.read_text().splitlines()[1:]
    return [Size(*map(int, line.split(","))) for line in lines]


if __name__ == "__main__":
    rows = [f"{tokens},{tiles}" for tokens, tiles in draw(ROWS, seed=0)]
    PATH.write_text("\n".join(["tokens,tiles", *rows]) + "\n")

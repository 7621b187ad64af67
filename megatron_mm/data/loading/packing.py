"""Packs samples into microbatches and assigns microbatches to data-parallel ranks.

All are pure functions of sizes. `pack` fills bins with whole samples of a buffer so that they are
nearly full of tokens and hold similar numbers of image tiles, because a ViT step takes as long as
its most loaded rank. `spread` assigns the bins to ranks; only it depends on the number of ranks.
`chunks` keeps the samples' order, for passes that learn nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from megatron_mm.data.sample import Size


def pack(
    sizes: Sequence[Size], num_bins: int, capacity: int, most_tiles: int | None = None
) -> list[list[int]]:
    """Returns bins of indices into `sizes`, each in increasing order.

    No bin exceeds `capacity` tokens or `most_tiles`, and no index occurs twice. The first sample is
    always placed, so every sample reaches the head of the buffer and none waits for ever.

    1. The samples that have waited longest, about as many as the bins hold, are placed in
       decreasing length: those with images into the bin with the fewest tiles, text into the
       fullest.
    2. Gaps are filled from the rest of the buffer, largest fit first. A bin takes images first
       only while it has fewer tiles than the mean.

    Args:
        sizes: sizes of the buffer's samples, longest waiting first, of 1 to `capacity` tokens and
            at most `most_tiles`.
        most_tiles: None: only the tokens count.
    """
    tokens = np.array([size.tokens for size in sizes], dtype=np.int64)
    tiles = np.array([size.tiles for size in sizes], dtype=np.int64)
    free = np.full(num_bins, capacity, dtype=np.int64)
    load = np.zeros(num_bins, dtype=np.int64)
    most = int(tiles.sum()) if most_tiles is None else most_tiles
    bins: list[list[int]] = [[] for _ in range(num_bins)]

    def place(index: int, chosen: int) -> None:
        bins[chosen].append(index)
        free[chosen] -= tokens[index]
        load[chosen] += tiles[index]

    held = [
        np.searchsorted(np.cumsum(of_each), num_bins * limit, side="right")
        for of_each, limit in ((tokens, capacity), (tiles, most))
    ]
    first = int(min(held))
    eldest = sorted(range(1, first), key=lambda i: (-tokens[i], i))
    left = list(range(max(first, 1), len(sizes)))
    for index in [0, *eldest] if len(sizes) else []:
        room = np.flatnonzero((free >= tokens[index]) & (load + tiles[index] <= most))
        if not len(room):
            left.append(index)
            continue
        # Among equals the fullest bin; lexsort's last key is the primary one.
        keys = (free[room], load[room]) if tiles[index] else (load[room], free[room])
        place(index, int(room[np.lexsort(keys)[0]]))
    _fill(tokens, tiles, left, free, load, most, place)
    return [sorted(chosen) for chosen in bins]


def _fill(tokens, tiles, left, free, load, most, place) -> None:
    """Step 2 of `pack`."""
    pools: dict[int, list[tuple[int, int]]] = defaultdict(list)  # by tiles, ascending in length
    for length, later in sorted((int(tokens[i]), -i) for i in left):
        pools[int(tiles[-later])].append((length, later))

    def largest(chosen: int, images: bool) -> tuple[tuple[int, int], int, int] | None:
        """Returns (sample, its pool, its place there) of the longest that fits into a bin."""
        limit, room = (int(free[chosen]), 0), most - load[chosen]
        ends = {n: bisect_right(pools[n], limit) for n in pools if bool(n) == images and n <= room}
        return max(
            ((pools[n][end - 1], n, end - 1) for n, end in ends.items() if end), default=None
        )

    target = load.mean()
    for chosen in np.argsort(-free, kind="stable"):
        while True:
            images_first = bool(load[chosen] < target)
            found = largest(chosen, images_first) or largest(chosen, not images_first)
            if found is None:
                break
            (_, later), pool, end = found
            del pools[pool][end]
            place(-later, int(chosen))


def spread(loads: Sequence[Size], num_ranks: int) -> list[list[int]]:
    """Returns the bins (indices into `loads`) of each rank, equally many for all.

    Balances the sums of tokens and tiles over ranks: bins go in decreasing tiles to the rank with
    the fewest, then the rank furthest from the mean swaps bins as long as that lowers the sum of
    squared relative deviations. A rank computes its bins in decreasing tiles, so that
    expert-parallel ranks, which wait for each other, compute similar bins at the same time.
    """
    per_rank = len(loads) // num_ranks
    load_B2 = np.array(loads, dtype=np.float64).reshape(len(loads), 2)
    # In units of the mean per rank; a step without images has no tiles to divide by.
    load_B2 /= np.maximum(load_B2.sum(0) / num_ranks, 1.0)
    owner_B = np.zeros(len(loads), dtype=np.int64)
    sums_R2, held_R = np.zeros((num_ranks, 2)), np.zeros(num_ranks, dtype=np.int64)
    for index in np.lexsort((np.arange(len(loads)), -load_B2[:, 0], -load_B2[:, 1])):
        open_ = np.flatnonzero(held_R < per_rank)
        rank = open_[np.lexsort((sums_R2[open_, 0], sums_R2[open_, 1]))[0]]
        owner_B[index], held_R[rank] = rank, held_R[rank] + 1
        sums_R2[rank] += load_B2[index]
    for _ in range(4 * len(loads)):
        if not _swap(load_B2, owner_B, sums_R2):
            break
    by_tiles = sorted(range(len(loads)), key=lambda i: (-loads[i].tiles, -loads[i].tokens, i))
    return [[i for i in by_tiles if owner_B[i] == rank] for rank in range(num_ranks)]


def _swap(load_B2: np.ndarray, owner_B: np.ndarray, sums_R2: np.ndarray) -> bool:
    """Makes the best swap for one of the four ranks furthest from the mean. Returns whether one
    helped."""
    far = ((sums_R2 - 1.0) ** 2).sum(1)
    for worst in np.argsort(-far, kind="stable")[:4]:
        mine, others = np.flatnonzero(owner_B == worst), np.flatnonzero(owner_B != worst)
        move_MO2 = load_B2[others][None] - load_B2[mine][:, None]  # load that `worst` would gain
        sums_O2 = sums_R2[owner_B[others]]
        # In (s + d)^2 + (t - d)^2 - s^2 - t^2 the means cancel.
        change_MO2 = 2.0 * move_MO2 * (sums_R2[worst] - sums_O2[None] + move_MO2)
        change_MO = change_MO2[..., 0] + change_MO2[..., 1]
        if not change_MO.size or change_MO.min() > -1e-9:  # smaller gains may be rounding and cycle
            continue
        at_mine, at_other = np.unravel_index(int(change_MO.argmin()), change_MO.shape)
        a, b = mine[at_mine], others[at_other]
        sums_R2[worst] += move_MO2[at_mine, at_other]
        sums_R2[owner_B[b]] -= move_MO2[at_mine, at_other]
        owner_B[a], owner_B[b] = owner_B[b], worst
        return True
    return False


def chunks(
    sizes: Sequence[Size],
    capacity: float = math.inf,
    most_tiles: int | None = None,
    most_rows: float = math.inf,
) -> list[list[int]]:
    """Returns the indices of samples in consecutive chunks, each of at most `capacity` tokens,
    `most_tiles` and `most_rows`. A sample beyond that has a chunk to itself.

    Args:
        most_tiles: None: as many as there are.
    """
    found: list[list[int]] = []
    tiles_allowed = math.inf if most_tiles is None else most_tiles
    tokens, tiles = 0, 0
    for index, size in enumerate(sizes):
        tokens, tiles = tokens + size.tokens, tiles + size.tiles
        full = bool(found) and len(found[-1]) == most_rows
        if not found or full or tokens > capacity or tiles > tiles_allowed:
            found.append([])
            tokens, tiles = size
        found[-1].append(index)
    return found

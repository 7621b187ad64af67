"""Places of looks as words: three tokens before `<look>` say where it looks (`query_place` tokens).

    cell 14<look_y_19><look_x_29><look_s_3><look> is 6

`<look_y_i>` and `<look_x_j>` are the middles of 32 equal parts of the image, from the top and from
the left; `<look_s_k>` is the side of the window, one of 6 in equal ratios from the whole image (0)
to `query_min_scale`. The model writes them as any word, so they are learnt from rows and sampled in
rollouts, where reinforcement reaches them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_mm.data.place_names import PLACE_TOKENS, PLACES, SCALES

WORDS = 3  # of a place
WHOLE = (0.5, 0.5, 1.0)  # y, x, scale of the whole image


@dataclass(frozen=True)
class PlaceTokens:
    """
    Attributes:
        first: id of the first of `PLACE_TOKENS`; the others follow it.
        min_scale: side of the smallest window, as a share of the image's.
    """

    first: int
    min_scale: float

    def spell(self, place: Sequence[float]) -> list[int]:
        """Returns the ids of the words nearest to (y, x, scale)."""
        y, x, scale = place
        rows = [min(PLACES - 1, int(at * PLACES)) for at in (y, x)]
        # min_scale 1 leaves one side, the whole image's
        octaves = math.log(scale) / math.log(self.min_scale) if self.min_scale < 1 else 0.0
        side = min(SCALES - 1, max(0, round(octaves * (SCALES - 1))))
        return [self.first + rows[0], self.first + PLACES + rows[1], self.first + 2 * PLACES + side]

    def spells(self, ids: Sequence[int]) -> bool:
        """Whether these ids are the words of a place, in their order."""
        parts = [range(PLACES), range(PLACES, 2 * PLACES), range(2 * PLACES, len(PLACE_TOKENS))]
        return len(ids) == WORDS and all(
            index - self.first in part for index, part in zip(ids, parts, strict=True)
        )

    def said(self, before_N3: torch.Tensor) -> torch.Tensor:
        """Returns the places (y, x, scale) that the three ids before each query spell, fp32 [N, 3];
        the whole image where they are no place. Nothing waits for the device."""
        begins = (0, PLACES, 2 * PLACES)
        rows_N3 = torch.stack(
            [before_N3[:, n] - (self.first + begin) for n, begin in enumerate(begins)], 1
        )
        y_N, x_N, side_N = rows_N3.unbind(1)
        known_N3 = (rows_N3 >= 0) & torch.stack((y_N < PLACES, x_N < PLACES, side_N < SCALES), 1)
        octaves_N = side_N.float() / (SCALES - 1)
        scale_N = torch.exp(math.log(self.min_scale) * octaves_N)
        place_N3 = torch.stack(((y_N + 0.5) / PLACES, (x_N + 0.5) / PLACES, scale_N), 1)
        whole_N3 = torch.stack([torch.full_like(scale_N, value) for value in WHOLE], 1)
        return torch.where(known_N3.all(1, keepdim=True), place_N3, whole_N3)

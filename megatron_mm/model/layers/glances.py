"""Memory of glimpses for the rows that are decoded: the patches of each prompt, what its last query
found, and where all of them looked.

Shapes: R rows, A some of them, N prompts, M memory patches, P patches of a prompt, h local heads, D
width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_mm.config.layers.queries import PLACE
from megatron_mm.model.decode import DecodeCache, LayerState
from megatron_mm.model.layers.window import Patches
from megatron_mm.model.query_map import SlotReads
from megatron_mm.model.segments import Segments


class Glances(LayerState):
    """Keys, values and places of the patches of every row's prompt, and what its last query
    found."""

    images = 1  # in a prompt, at most

    @property
    def branches(self) -> tuple[int, ...]:
        """See `LayerState`: several images are weighed against each other."""
        return (self.images,)

    def store(
        self,
        key_MhD: torch.Tensor,
        value_MhD: torch.Tensor,
        reads: SlotReads,
        patches: Segments,
    ) -> None:
        """Stores what a prefill's memory holds. `patches`: those of each prompt."""
        self.images = max(self.images, reads.images)
        for name, x in (("key", key_MhD), ("value", value_MhD)):
            self.hand_out_rectangle(name, patches.to_rectangle(x).transpose(1, 2))
        places = patches.to_rectangle(reads.places_M4)
        self.hand_out_rectangle("places", places.unsqueeze(1))
        self.hand_out("counts", patches.lengths.to(places.device))

    def patches(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Patches, torch.Tensor]:
        """Returns the patches of some rows, and bool [A], which rows have none: they must not be
        read.

        Args:
            pick: takes these rows out of all R.
        """
        key, value, places, counts_R = (
            pick(self.tensors[name]) for name in ("key", "value", "places", "counts")
        )
        places = places.squeeze(1)
        number_P = torch.arange(key.shape[2], device=key.device)
        blind_R = counts_R == 0
        absent_RP = (number_P >= counts_R.unsqueeze(1)) & ~blind_R.unsqueeze(1)
        held = Patches(
            key.transpose(1, 2),
            value.transpose(1, 2),
            places[..., :3],
            places[..., 3].long(),
            self.images,
            absent_RP,
        )
        return held, blind_R


def asked_of_step(cache: DecodeCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the position of every row's token, int64 [R], and the place that it should ask for if
    it is a query, fp32 [R, 3]; NaN: any."""
    targets_RM3 = cache.targets_RM3
    if targets_RM3 is None:
        return cache.lengths_R, torch.full(
            (cache.rows, PLACE), torch.nan, device=cache.row_R.device
        )
    number_R = cache.asks_R.clamp(1, targets_RM3.shape[1]) - 1
    return cache.lengths_R, targets_RM3[cache.row_R, number_R]

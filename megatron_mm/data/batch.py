"""Microbatch: several samples packed end to end in one stream of tokens.

This is the only form. Samples are never padded to a rectangle; `cu_seqlens` marks where each
begins, and every layer that mixes positions respects it. Shape letters: T tokens in the stream,
N tiles, M memory patches, P patches along a tile's side.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch

# Shapes depend on these; reading them from a GPU would synchronise with it.
ON_CPU = ("cu_seqlens", "stream_positions", "memory_visible_M2")


@dataclass
class Microbatch:
    tokens_T: torch.Tensor  # int64
    labels_T: torch.Tensor  # int64, the next token of the same sample
    loss_mask_T: torch.Tensor  # float32, 1 where the label is supervised
    position_ids_T: torch.Tensor  # int64, 0 at the start of every sample
    cu_seqlens: torch.Tensor  # int64 [samples + 1], from 0 to T
    num_real_tokens: int  # tokens before the padding tail (a segment of its own)
    pixels_NCHW: torch.Tensor  # float32, normalised
    stream_tiles: torch.Tensor  # int64, the tiles whose shuffled features enter the stream
    stream_positions: torch.Tensor  # int64, positions in T, tile by tile, row by row
    memory_tiles: torch.Tensor  # int64, the tiles a look may attend to
    memory_coordinates_M2: torch.Tensor  # float32 (y, x) of each patch centre, 0..1 of its image
    memory_visible_M2: torch.Tensor  # int64, positions [from, to) that may see each patch
    samples: list[str] = field(default_factory=list)  # "file:row" of each sample
    skipped: list[str] = field(default_factory=list)  # rows left out, with the reason
    # Experts to use at every position, MoE index -> int16 [T, k] (model/routing.py), for the
    # layers of this rank's stages. None: routers choose.
    routes: dict[int, torch.Tensor] | None = None
    # Noise added to the logits of routers that choose, MoE index -> float32 [T, E]; same layers.
    route_noise: dict[int, torch.Tensor] | None = None

    def to(self, device: torch.device | str) -> Microbatch:
        """Moves what is computed with to `device`; lengths and positions stay on the CPU."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(getattr(self, f.name), torch.Tensor) and f.name not in ON_CPU
        }
        for name in ("routes", "route_noise"):
            if (by_layer := getattr(self, name)) is not None:
                moved[name] = {
                    index: values.to(device, non_blocking=True)
                    for index, values in by_layer.items()
                }
        return replace(self, **moved)

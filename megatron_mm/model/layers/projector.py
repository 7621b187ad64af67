"""From patch features to language tokens: pixel shuffle, then a two-layer MLP (InternVL)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.distributed import ProcessGroup

from megatron_mm.config import ModelConfig
from megatron_mm.config.families import PatchGrid, vision_settings
from megatron_mm.model.layers.linear import column, row
from megatron_mm.model.layers.norms import VisionLayerNorm
from megatron_mm.parallel.param_layout import normal


def pixel_shuffle(
    features_NPV: torch.Tensor, rows: int, columns: int, factor: int, version: str
) -> torch.Tensor:
    """Folds factor x factor patches into one token: [N, P, V] -> [N, P / f^2, V * f^2], where
    P = rows * columns patches lie in reading order.

    The features of a token are ordered (patch row, patch column, feature) in both versions.
    v2 leaves the tokens in reading order. v1, kept for the first InternVL releases, leaves
    rows and columns of the token grid swapped.
    """
    tiles, _, width = features_NPV.shape
    down, across = rows // factor, columns // factor
    grid = features_NPV.view(tiles, down, factor, across, factor, width)
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return grid.permute(order).reshape(tiles, down * across, factor * factor * width)


class Projector(nn.Module):
    """LayerNorm, linear, gelu, linear; whole inputs and outputs on every TP rank."""

    def __init__(
        self, model: ModelConfig, grid: PatchGrid, config: TransformerConfig, tp: ProcessGroup
    ):
        super().__init__()
        self.rows, self.columns = grid.rows, grid.columns
        self.factor = model.fusion.pixel_shuffle_factor
        self.version = model.fusion.pixel_shuffle_version
        inputs = vision_settings(model).vision_hidden_size * self.factor**2
        outputs = model.language.hidden_size
        init = normal(model.language.init_method_std)
        common = {"config": config, "init": init, "tp": tp, "bias": True}
        self.norm = VisionLayerNorm(inputs, 1e-5, dtype=config.params_dtype)
        self.linear_fc1 = column(inputs, outputs, **common)
        self.linear_fc2 = row(outputs, outputs, **common)

    def forward(self, features_NPV: torch.Tensor) -> torch.Tensor:
        """[N, patches of a tile, V] -> [N, tokens of a tile, H]"""
        shuffled = pixel_shuffle(features_NPV, self.rows, self.columns, self.factor, self.version)
        return self.linear_fc2(F.gelu(self.linear_fc1(self.norm(shuffled))[0]))[0]

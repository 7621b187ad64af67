"""Mixing of positions in a gated DeltaNet layer: convolution, then delta rule."""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_mm.model.layers.gdn.convolution import last_inputs, stream_conv
from megatron_mm.model.layers.gdn.delta_rule import delta_rule_and_state, stream_delta_rule
from megatron_mm.model.segments import Segments


class HeadWidths(NamedTuple):
    """Widths of one key head: K features of its key, V of each of the r values that it serves."""

    key: int
    value: int
    values: int

    @property
    def rows(self) -> list[int]:
        """Channels of q, k and v in one key head's block."""
        return [self.key, self.key, self.values * self.value]


def split_heads(
    qkv: torch.Tensor, widths: HeadWidths
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[..., k * (2 K + r V)] -> query and key [..., k, K], value [..., k * r, V]."""
    blocks = qkv.reshape(*qkv.shape[:-1], -1, sum(widths.rows))
    query, key, value = blocks.split(widths.rows, dim=-1)
    return query, key, value.reshape(*qkv.shape[:-1], -1, widths.value)


def convolve_and_scan(
    qkv_TC: torch.Tensor,
    conv_weight_CW: torch.Tensor,
    log_decay_Th: torch.Tensor,
    beta_Th: torch.Tensor,
    segments: Segments,
    widths: HeadWidths,
) -> torch.Tensor:
    """Convolution and delta rule in torch; both restart at every sample.

    Args:
        qkv_TC: for every key head its [q, k, v].
        log_decay_Th: fp32, for every value head; <= 0.
        beta_Th: write strength, in (0, 1).
    Returns:
        [T, value heads, V]
    """
    qkv = stream_conv(qkv_TC, conv_weight_CW, segments.sizes)
    query, key, value = split_heads(qkv, widths)
    return stream_delta_rule(query, key, value, log_decay_Th, beta_Th, segments.sizes)


def convolve_scan_and_keep(
    qkv_TC: torch.Tensor,
    conv_weight_CW: torch.Tensor,
    log_decay_Th: torch.Tensor,
    beta_Th: torch.Tensor,
    segments: Segments,
    widths: HeadWidths,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`convolve_and_scan` without gradients, and each sample's state to continue from: the last
    inputs of its convolution [samples, W - 1, C], its state in fp32 [samples, k, r, K, V]."""
    qkv = stream_conv(qkv_TC, conv_weight_CW, segments.sizes)
    query, key, value = split_heads(qkv, widths)
    out, state = delta_rule_and_state(query, key, value, log_decay_Th, beta_Th, segments.sizes)
    return out, last_inputs(qkv_TC, conv_weight_CW.shape[1], segments), state

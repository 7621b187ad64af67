"""Gated DeltaNet's mixing of positions, one position of each row.

The recurrence of `delta_rule.py` as it stands in the paper (arXiv 2412.06464, eq. 10). A row's past
is its state, so a step costs the same at any position.

Here the channels of the convolution are ordered by part: the queries of all key heads, then the
keys, then the values (`by_part`). So what follows it needs no copy of each part.

Shapes: R rows, C channels, W taps, k key heads, r value heads for each, h = k r, K key width, V
value width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megatron_mm.model.layers.gdn.delta_rule import inverse_norm
from megatron_mm.model.layers.gdn.mix import HeadWidths


def by_part(keys: int, widths: Sequence[int]) -> torch.Tensor:
    """int64, the features of all key heads' first parts, then of their second, ..., as places in a
    row that goes key head by key head.

    Args:
        widths: of the parts of one key head.
    """
    places = torch.arange(keys * sum(widths)).view(keys, -1)
    return torch.cat([part.flatten() for part in places.split(list(widths), dim=1)])


def convolve_and_step(
    x_RC: torch.Tensor,
    taps: Sequence[torch.Tensor],
    log_decay_Rh: torch.Tensor,
    beta_Rh: torch.Tensor,
    inputs: torch.Tensor,
    state: torch.Tensor,
    widths: HeadWidths,
) -> torch.Tensor:
    """`convolve_and_scan` of one position of each row, [R, h, V].

    Args:
        x_RC: channels by part.
        taps: W times [C], the oldest input's first; channels by part.
        inputs: [R, W - 1, C], those of the convolution before this one, moved on in place.
        log_decay_Rh: fp32.
        state: fp32 [R, k, r, K, V], updated in place.
    """
    mixed = convolution_step(x_RC, taps, inputs).float()
    both, value = split_parts(mixed, state.shape[1], widths)
    return delta_rule_step(both, value, log_decay_Rh, beta_Rh, state).to(x_RC.dtype)


def split_parts(
    x_RC: torch.Tensor, keys: int, widths: HeadWidths
) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels by part -> (queries and keys [R, 2, k, K], values [R, h, V])."""
    both, value = x_RC.tensor_split([2 * keys * widths.key], 1)
    rows = len(x_RC)
    return both.view(rows, 2, keys, widths.key), value.view(rows, -1, widths.value)


def convolution_step(
    x_RC: torch.Tensor, taps: Sequence[torch.Tensor], inputs_RWC: torch.Tensor
) -> torch.Tensor:
    """[R, C] after silu; arguments of `convolve_and_step`."""
    mixed, before = x_RC * taps[-1], inputs_RWC.unbind(1)
    for old, tap in zip(before, taps, strict=False):
        mixed.addcmul_(old, tap)
    if before:  # none with one tap
        inputs_RWC.copy_(torch.stack((*before[1:], x_RC), 1))
    return F.silu(mixed, inplace=True)


def delta_rule_step(
    query_and_key_R2kK: torch.Tensor,
    value_RhV: torch.Tensor,
    log_decay_Rh: torch.Tensor,
    beta_Rh: torch.Tensor,
    state: torch.Tensor,
) -> torch.Tensor:
    """[R, h, V]; all in fp32 but beta.

    Args:
        query_and_key: not yet normalised.
        state: [R, k, r, K, V], updated in place.
    """
    rows, heads, width = value_RhV.shape
    scale = inverse_norm(query_and_key_R2kK)
    scale[:, 0].mul_(query_and_key_R2kK.shape[-1] ** -0.5)
    both = (query_and_key_R2kK * scale).unsqueeze(3).expand(-1, -1, -1, state.shape[2], -1)
    q, k = both.transpose(0, 1).reshape(2, rows * heads, 1, -1).unbind()
    flat = state.view(rows * heads, *state.shape[3:])
    flat.mul_(log_decay_Rh.exp().view(-1, 1, 1))
    value = value_RhV.reshape(rows * heads, 1, width)
    new = (value - torch.bmm(k, flat)).mul_(beta_Rh.float().reshape(-1, 1, 1))
    flat.baddbmm_(k.transpose(1, 2), new)
    return torch.bmm(q, flat).view(rows, heads, width)

"""The gated delta rule, one position of each row.

The recurrence of `delta_rule.py` as it stands in the paper (arXiv 2412.06464, eq. 10). A row's past
is its state, so a step costs the same at any position.

Shapes: R rows, k key heads, r value heads for each, K key width, V value width.
"""

from __future__ import annotations

import torch

from megatron_mm.model.layers.gdn.delta_rule import inverse_norm


def delta_rule_step(
    query_RkK: torch.Tensor,
    key_RkK: torch.Tensor,
    value_RhV: torch.Tensor,
    log_decay_Rh: torch.Tensor,
    beta_Rh: torch.Tensor,
    state: torch.Tensor,
) -> torch.Tensor:
    """[R, h, V] in the dtype of value, h = k r; computed in fp32.

    Args:
        query, key: not yet normalised.
        state: fp32 [R, k, r, K, V], updated in place.
    """
    rows, heads, width = value_RhV.shape
    keys = key_RkK.shape[1]
    q, k = query_RkK.float(), key_RkK.float()
    q = q * inverse_norm(q).mul_(q.shape[-1] ** -0.5)
    k = k * inverse_norm(k)
    grouped = (rows, keys, heads // keys)
    flat = state.view(rows * heads, *state.shape[3:])
    q, k = (
        x.unsqueeze(2).expand(*grouped, x.shape[-1]).reshape(rows * heads, 1, x.shape[-1])
        for x in (q, k)
    )
    flat.mul_(log_decay_Rh.float().exp().reshape(-1, 1, 1))
    value = value_RhV.float().reshape(rows * heads, 1, width)
    new = (value - torch.bmm(k, flat)).mul_(beta_Rh.float().reshape(-1, 1, 1))
    flat.baddbmm_(k.transpose(1, 2), new)
    return torch.bmm(q, flat).view(rows, heads, width).to(value_RhV.dtype)

"""Rotary position embedding on the first part of each head (Qwen3-Next rotates a quarter)."""

from __future__ import annotations

import torch


def rotary_table(
    position_ids_T: torch.Tensor, rotary_dim: int, base: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, rotary_dim] in fp32 (Su et al. 2021, eq. 34; halves, not pairs)."""
    exponent = torch.arange(0, rotary_dim, 2, device=position_ids_T.device).float() / rotary_dim
    angles = position_ids_T.float()[:, None] / base**exponent
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first `cos.shape[-1]` features of x [T, heads, D]; the rest pass through."""
    rotary_dim = cos.shape[-1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1)

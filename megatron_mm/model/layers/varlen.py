"""Softmax attention over packed streams by torch's own kernel (`torch.nn.attention.varlen`,
FlashAttention 2: Dao 2023, arXiv 2307.08691): no rectangles, no padding, no masks.

No GPU has run it here. Tests run torch's function on the CPU with its kernel written out.
"""

from __future__ import annotations

import inspect

import torch
from torch.nn.attention.varlen import varlen_attn

from megatron_mm import platform
from megatron_mm.model.segments import Bounds

DTYPES = (torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)  # Ampere
WIDEST = 256  # features of a head; a multiple of 8
# Their backward pass exists on some GPUs only (torch's sdp_utils.cpp); no model has such heads.
DOUBTFUL = range(193, 225)


# From torch 2.12 on it must be told that heads share keys and values; 2.11 has no word for it.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def suits(query_ThD: torch.Tensor) -> bool:
    """Whether torch's kernel takes such queries: on a GPU from Ampere on, 16 bits, heads of up to
    256 features."""
    width, capability = query_ThD.shape[-1], platform.compute_capability(query_ThD.device)
    return (
        capability is not None
        and capability >= CAPABILITY
        and query_ThD.dtype in DTYPES
        and width % 8 == 0
        and width <= WIDEST
        and width not in DOUBTFUL
    )


def attend(
    query_ThD: torch.Tensor,
    key_MgD: torch.Tensor,
    value_MgD: torch.Tensor,
    bounds: Bounds,
    causal: bool = False,
) -> torch.Tensor:
    """Attends from each segment of T to its segment of M, [T, h, D]; g divides h, and the heads
    of a group share keys and values.

    Args:
        causal: the segments are of the same positions, and none sees a later one.
    """
    return varlen_attn(
        query_ThD,
        key_MgD,
        value_MgD,
        bounds.queries,
        bounds.keys,
        bounds.most_queries,
        bounds.most_keys,
        window_size=(-1, 0) if causal else (-1, -1),
        **GROUPED,
    )

"""Softmax attention inside each sample of the stream.

Shapes: T whole stream, h query heads, D head width; key and value may have fewer heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_mm.model.segments import Segments


def causal_attention(
    query_ThD: torch.Tensor, key_ThD: torch.Tensor, value_ThD: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """Softmax attention inside each sample, [T, h, D]; key and value may have fewer heads."""
    mixed = []
    for bucket in segments.buckets.parts:
        query, key, value = (
            bucket.to_rectangle(x).transpose(1, 2) for x in (query_ThD, key_ThD, value_ThD)
        )
        found = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
        )
        mixed.append(found.transpose(1, 2))
    return segments.buckets.join(mixed)

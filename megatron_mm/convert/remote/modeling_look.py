"""The memories of a batch of prompts, and looks at them. Travels with exported weights.

A memory holds patch features before the pixel shuffle; there may be several. The hidden state of
every position queries the one that its look reads.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

FREQUENCIES = 6  # of the coordinates: 2^0 .. 2^5 half periods over the image


class Memory:
    """One memory's patches of a batch of prompts as a rectangle [B, P], and the keys and values of
    each look and glimpse that reads it.

    Attributes:
        places: fp32 [B, P, 3], y, x and log2 of the side of each patch, in shares of the image.
        image: [B, P], the number of its image among those of the prompt.
        counts: patches of each prompt.
    """

    def __init__(self, batch: int, rows, coordinates, extents, sample, visible_from):
        counts = torch.bincount(sample, minlength=batch)
        width = int(counts.max()) if len(sample) else 0
        place = torch.arange(len(sample), device=sample.device)
        place = place - (counts.cumsum(0) - counts)[sample]  # patches are ordered by sample
        self.rows = rows.new_zeros(batch, width, rows.shape[-1])
        self.rows[sample, place] = rows
        self.places = coordinates.new_zeros(batch, width, 3)
        self.places[sample, place] = torch.cat((coordinates, extents.log2()[:, None]), 1)
        never = torch.iinfo(torch.int64).max
        self.visible_from = torch.full((batch, width), never, device=sample.device)
        self.visible_from[sample, place] = visible_from
        # Images become visible one after the other.
        self.image = F.pad((self.visible_from.diff() != 0).long(), (1, 0)).cumsum(1)
        self.counts = counts.tolist()
        self.projected: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}


class CLVRLook(nn.Module):
    def __init__(self, config, memory: dict):
        super().__init__()
        text, extra = config.text_config, config.clvr
        assert extra is not None
        self.reads = memory["name"]
        self.dim = extra["fusion"]["clvr_kv_channels"]
        width = extra["fusion"]["clvr_num_attention_heads"] * self.dim
        hidden, eps = text.hidden_size, text.rms_norm_eps
        self.query_norm = Qwen3NextRMSNorm(hidden, eps)
        self.memory_norm = Qwen3NextRMSNorm(memory["width"], eps)
        self.linear_q = nn.Linear(hidden, width, bias=False)
        # Rows are [key, value] of each head.
        self.linear_kv = nn.Linear(memory["width"], 2 * width, bias=False)
        self.q_norm = Qwen3NextRMSNorm(self.dim, eps)
        self.k_norm = Qwen3NextRMSNorm(self.dim, eps)
        self.linear_coordinates = None
        if memory["coordinates"]:
            self.linear_coordinates = nn.Linear(4 * FREQUENCIES, width, bias=False)
        self.linear_proj = nn.Linear(width, hidden, bias=False)

    def project(self, memory: Memory):
        """Keys and values of the memory, [B, heads, P, dim]."""
        fused = self.linear_kv(self.memory_norm(memory.rows))
        key, value = fused.view(*fused.shape[:2], -1, 2 * self.dim).chunk(2, dim=-1)
        if self.linear_coordinates is not None:
            exponent = torch.arange(FREQUENCIES, device=key.device)
            angles = memory.places[..., :2].unsqueeze(-1) * (math.pi * 2.0**exponent)
            features = torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(2)
            key = key + self.linear_coordinates(features.to(key.dtype)).view_as(key)
        return self.k_norm(key).transpose(1, 2), value.transpose(1, 2)

    def forward(self, hidden: torch.Tensor, memories: dict[str, Memory], first: int, pair: int):
        """Returns what each position finds, [B, T, H]; exactly 0 where no image stands before it.

        `first` is the place of the first position in its padded row.
        """
        memory = memories[self.reads]
        name = f"look {pair}"
        if name not in memory.projected:
            memory.projected[name] = self.project(memory)
        key, value = memory.projected[name]
        query = self.linear_q(self.query_norm(hidden))
        query = self.q_norm(query.view(*query.shape[:2], -1, self.dim)).transpose(1, 2)
        place = torch.arange(first, first + hidden.shape[1], device=hidden.device)
        visible = place[None, :, None] >= memory.visible_from[:, None, :]
        sees = visible.any(-1)[:, None, :, None]
        mask = visible.unsqueeze(1) | ~sees  # softmax over nothing is NaN
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        found = torch.where(sees, found, 0.0)
        return self.linear_proj(found.transpose(1, 2).flatten(2))

"""Experts that hand tokens to further experts of their layer (letter C). Travels with exported
weights."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm


class Delegate(nn.Module):
    """The second hop of a layer of experts (C): tokens that its gate hands over go to further
    experts of the layer, with the first hop's result."""

    def __init__(self, text, settings: dict):
        super().__init__()
        self.settings, hidden = settings, text.hidden_size
        self.norm = Qwen3NextRMSNorm(hidden, text.rms_norm_eps)
        self.gate = nn.Linear(hidden, 1)
        self.router = nn.Linear(hidden, text.num_experts, bias=False)
        self.scale = nn.Parameter(torch.zeros(hidden))
        self.hard = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, stream, normed, result, block):
        """Returns the result with what the second hop adds; `block` is the layer's experts, which
        made it of `normed`."""
        read = stream if self.settings["delegate_input"] == "stream" else stream + result
        z = self.norm(read).flatten(0, 1)
        bias = self.gate.bias.float()
        gate = F.linear(z.float(), self.gate.weight.float(), bias).squeeze(-1).sigmoid()
        rows = (gate > 1.5 * self.hard.float() - 1).nonzero().flatten()
        x, k = z[rows], self.settings["delegate_topk"]
        scores = F.linear(x.float(), self.router.weight.float())
        allowed = scores
        if self.settings["delegate_distinct"]:
            allowed = scores.scatter(1, block.gate(normed)[2][rows], -math.inf)
        best, experts = allowed.topk(k)
        weights = best.softmax(-1) if k > 1 else scores.softmax(-1).gather(1, experts)
        weights = (weights * gate[rows, None]).to(x.dtype)
        found = block.experts(x, experts, weights) * self.scale
        return result.flatten(0, 1).index_add(0, rows, found).view_as(result)

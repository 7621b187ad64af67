"""InternViT: patches to features, tensor parallel, without sequence parallelism.

Activations are whole on every tensor-parallel rank and heads are split, so the gradients
of norms, layer scale and embeddings are complete on each rank and need no reduction.

Shapes: N tiles, P patches of a tile, S = P + 1 positions, V vision width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.distributed import ProcessGroup

from megatron_mm.model.families.internvit.settings import InternViTSettings
from megatron_mm.model.layers.linear import column, row
from megatron_mm.model.layers.norms import FullWidthRMSNorm, VisionLayerNorm, VisionRMSNorm
from megatron_mm.model.layers.scaled_add import scaled_add
from megatron_mm.model.recompute import recomputed
from megatron_mm.parallel.param_layout import constant, normal, place

NORMS: dict[str, type[nn.Module]] = {"LayerNorm": VisionLayerNorm, "RMSNorm": VisionRMSNorm}


class VisionEmbedding(nn.Module):
    """Patch projection, class token and learned positions (resized bicubically if need be)."""

    def __init__(self, vision: InternViTSettings, dtype: torch.dtype):
        super().__init__()
        width, self.patch = vision.vision_hidden_size, vision.patch_size
        self.side = vision.image_size // vision.patch_size
        init = normal(vision.vision_init_method_std)
        self.patch_weight = nn.Parameter(torch.empty(width, 3, self.patch, self.patch, dtype=dtype))
        self.patch_bias = nn.Parameter(torch.empty(width, dtype=dtype))
        self.class_token = nn.Parameter(torch.empty(1, 1, width, dtype=dtype))
        self.positions = nn.Parameter(torch.empty(1, self.side**2 + 1, width, dtype=dtype))
        place(self.patch_weight, init)
        place(self.patch_bias, constant(0.0))
        place(self.class_token, init)
        place(self.positions, init)

    def _positions(self, height: int, width: int) -> torch.Tensor:
        rows, columns = height // self.patch, width // self.patch
        if (rows, columns) == (self.side, self.side):
            return self.positions
        grid = self.positions[:, 1:].reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(
            grid.float(), size=(rows, columns), mode="bicubic", align_corners=False
        ).to(self.positions.dtype)
        return torch.cat((self.positions[:, :1], grid.flatten(2).transpose(1, 2)), dim=1)

    def forward(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """[N, 3, height, width] -> [N, S, V]; the class token stands first."""
        height, width = pixels_NCHW.shape[2:]
        pixels = pixels_NCHW.to(self.patch_weight.dtype)
        # A convolution whose stride is its kernel is one matrix product over patches.
        patches = F.unfold(pixels, self.patch, stride=self.patch).transpose(1, 2)
        features = F.linear(patches, self.patch_weight.flatten(1), self.patch_bias)
        first = self.class_token.expand(len(features), -1, -1)
        return torch.cat((first, features), dim=1) + self._positions(height, width)


class VisionAttention(nn.Module):
    """Full attention inside a tile; the rows of the fused projection are [q, k, v] per head.

    Heads that the ranks do not divide (InternViT-6B has 25) are padded with heads of zeros,
    which add nothing and get no gradient.
    """

    def __init__(self, vision: InternViTSettings, config: TransformerConfig, tp: ProcessGroup):
        super().__init__()
        width = vision.vision_hidden_size
        self.heads = -(-vision.vision_num_attention_heads // tp.size())
        self.head_dim = width // vision.vision_num_attention_heads
        init, dtype = normal(vision.vision_init_method_std), config.params_dtype
        common = {"config": config, "init": init, "tp": tp}
        local = self.heads * self.head_dim
        padded = local * tp.size()
        self.linear_qkv = column(
            width,
            3 * padded,
            bias=vision.vision_add_qkv_bias,
            whole_outputs=3 * width,
            **common,
        )
        self.linear_proj = row(padded, width, bias=True, whole_inputs=width, **common)
        self.q_norm: FullWidthRMSNorm | None = None
        self.k_norm: FullWidthRMSNorm | None = None
        if vision.vision_qk_layernorm:
            eps = 1e-6  # fixed in the reference, whatever the layers' epsilon
            self.q_norm = FullWidthRMSNorm(width, local, eps, tp=tp, dtype=dtype)
            self.k_norm = FullWidthRMSNorm(width, local, eps, tp=tp, dtype=dtype)

    def forward(self, hidden_NSV: torch.Tensor) -> torch.Tensor:
        fused, _ = self.linear_qkv(hidden_NSV)
        fused = fused.view(*fused.shape[:2], self.heads, 3 * self.head_dim)
        query, key, value = fused.chunk(3, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        mixed = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
        return self.linear_proj(mixed.transpose(1, 2).flatten(2))[0]


class VisionLayer(nn.Module):
    """Pre-norm attention and MLP, each scaled per feature before it joins the residual."""

    def __init__(self, vision: InternViTSettings, config: TransformerConfig, tp: ProcessGroup):
        super().__init__()
        width, dtype = vision.vision_hidden_size, config.params_dtype
        norm, eps = NORMS[vision.vision_normalization], vision.vision_layernorm_epsilon
        init = normal(vision.vision_init_method_std)
        common = {"config": config, "init": init, "tp": tp, "bias": True}
        self.norm1 = norm(width, eps, dtype=dtype)
        self.attention = VisionAttention(vision, config, tp)
        self.norm2 = norm(width, eps, dtype=dtype)
        self.linear_fc1 = column(width, vision.vision_ffn_hidden_size, **common)
        self.linear_fc2 = row(vision.vision_ffn_hidden_size, width, **common)
        self.scale1 = nn.Parameter(torch.empty(width, dtype=dtype))
        self.scale2 = nn.Parameter(torch.empty(width, dtype=dtype))
        place(self.scale1, constant(vision.vision_layer_scale_init))
        place(self.scale2, constant(vision.vision_layer_scale_init))

    def forward(self, hidden_NSV: torch.Tensor) -> torch.Tensor:
        mixed = self.attention(self.norm1(hidden_NSV))
        hidden_NSV = scaled_add(hidden_NSV, mixed, self.scale1)
        inner = F.gelu(self.linear_fc1(self.norm2(hidden_NSV))[0])
        return scaled_add(hidden_NSV, self.linear_fc2(inner)[0], self.scale2)


class InternViT(nn.Module):
    """Computes patch features of tiles. `config` must have sequence parallelism off."""

    def __init__(
        self,
        vision: InternViTSettings,
        config: TransformerConfig,
        tp: ProcessGroup,
        recompute: bool,
    ):
        super().__init__()
        self.recompute = recompute
        self.embedding = VisionEmbedding(vision, config.params_dtype)
        self.layers = nn.ModuleList(
            VisionLayer(vision, config, tp) for _ in range(vision.vision_num_layers)
        )

    def forward(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """[N, 3, height, width] -> [N, P, V] in reading order, without the class token."""
        hidden = self.embedding(pixels_NCHW)
        for layer in self.layers:
            hidden = recomputed(layer, hidden) if self.recompute else layer(hidden)
        return hidden[:, 1:]

"""Small random transformers model, and the copy of its weights to mcore by explicit transforms.

Independent of the converter (convert/), so that one can check the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration

from megatron_mm.config import ModelConfig, to_transformers_dict, without_clvr

IMAGE_TOKEN = 95  # last id of the small models' vocabulary of 96; random text avoids it
# CLVR and glimpses, which transformers lacks.
MCORE_ONLY = ("language.looks.", "language.queries.", "vision.memory_proj")


def transformers_model(model: ModelConfig, seed: int = 0) -> InternVLForConditionalGeneration:
    """Builds the base model (without looks) in transformers: fp32, eager attention, eval mode, and
    no parameter at its default, where a mistake could hide."""
    base = replace(model, hybrid_layer_pattern=without_clvr(model.hybrid_layer_pattern))
    keywords = to_transformers_dict(base, image_token_id=IMAGE_TOKEN)
    keywords.pop("model_type")
    config = InternVLConfig(**keywords)
    # "eager" for the experts too: the default uses one grouped product whose fp32 result depends on
    # how rows are batched.
    hf = InternVLForConditionalGeneration._from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    randomise(hf, seed)
    return hf.eval().requires_grad_(False)


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Draws every parameter away from its default, at a scale that keeps activations near one."""
    g = torch.Generator().manual_seed(seed)
    for name, param in module.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "A_log":  # decay rates from slow to fast
            param.uniform_(math.log(0.05), math.log(4.0), generator=g)
        elif leaf in ("lambda_1", "lambda_2"):
            param.uniform_(0.5, 1.5, generator=g)
        elif param.dim() == 1:  # norm weights (around 0 or 1), biases
            param.add_(torch.empty_like(param).normal_(0.0, 0.3, generator=g))
        elif leaf in ("cls_token", "position_embeddings") or "embed_tokens" in name:
            param.normal_(0.0, 1.0, generator=g)
        else:
            fan_in = param[0].numel() if param.dim() != 3 else param.shape[-1]
            # Branches add little to the residual stream, as in a trained model: otherwise norms of
            # nearly cancelled vectors amplify rounding tenfold per layer.
            branch = any(part in name for part in ("out_proj", "o_proj", "down_proj"))
            param.normal_(0.0, (0.3 if branch else 1.0) * fan_in**-0.5, generator=g)


class Ledger:
    """Checks that every hf tensor is taken once and every mcore parameter set once."""

    def __init__(self, hf: nn.Module, mcore: nn.Module):
        self.left = dict(hf.named_parameters())
        self.unset = {n: p for n, p in mcore.named_parameters() if not n.startswith(MCORE_ONLY)}

    def take(self, name: str) -> torch.Tensor:
        return self.left.pop(name)  # KeyError: unknown, or taken before

    def put(self, name: str, value: torch.Tensor) -> None:
        target = self.unset.pop(name)  # KeyError: unknown, or set before
        assert target.numel() == value.numel(), f"{name}: {target.shape} from {value.shape}"
        # A view may have more dimensions than the hf tensor (the halves of a GLU), but a tensor of
        # the right size and another shape is a mistake.
        assert target.shape[-1] == value.shape[-1], f"{name}: {target.shape} from {value.shape}"
        with torch.no_grad():
            target.copy_(value.reshape(target.shape))

    def move(self, hf: str, mcore: str) -> None:
        self.put(mcore, self.take(hf))

    def close(self) -> None:
        assert not self.left, f"not consumed: {sorted(self.left)}"
        assert not self.unset, f"never set: {sorted(self.unset)}"


def copy_weights(hf: InternVLForConditionalGeneration, mcore: nn.Module) -> None:
    """Copies all hf weights to the mcore model (one rank, one stage). Parameters of sides stay."""
    text, vision = hf.config.text_config, hf.config.vision_config
    ledger = Ledger(hf, mcore)
    copy_vision(ledger, vision, "model.vision_tower.", "vision.vit.")
    for name, here in (("layer_norm", "norm"), ("linear_1", "linear_fc1")):
        for part in ("weight", "bias"):
            ledger.move(
                f"model.multi_modal_projector.{name}.{part}", f"vision.projector.{here}.{part}"
            )
    for part in ("weight", "bias"):
        ledger.move(
            f"model.multi_modal_projector.linear_2.{part}", f"vision.projector.linear_fc2.{part}"
        )
    ledger.move("model.language_model.embed_tokens.weight", "embedding.weight")
    for number, kind in enumerate(text.layer_types):
        there = f"model.language_model.layers.{number}."
        here = f"language.layers.{number}."
        ledger.move(there + "input_layernorm.weight", here + "mixer.norm.weight")
        if kind == "linear_attention":
            copy_gdn(ledger, text, there + "linear_attn.", here + "mixer.inner.")
        else:
            copy_attention(ledger, text, there + "self_attn.", here + "mixer.inner.")
        ledger.move(there + "post_attention_layernorm.weight", here + "moe.norm.weight")
        copy_experts(ledger, there + "mlp.", here + "moe.inner.")
    ledger.move("model.language_model.norm.weight", "final_norm.weight")
    ledger.move("lm_head.weight", "output_layer.weight")
    ledger.close()


def copy_vision(ledger: Ledger, config, hf: str, mcore: str) -> None:
    ledger.move(hf + "embeddings.cls_token", mcore + "embedding.class_token")
    ledger.move(hf + "embeddings.position_embeddings", mcore + "embedding.positions")
    projection = hf + "embeddings.patch_embeddings.projection."
    ledger.move(projection + "weight", mcore + "embedding.patch_weight")
    ledger.move(projection + "bias", mcore + "embedding.patch_bias")
    heads = config.num_attention_heads
    with_bias = ("weight", "bias")
    for number in range(config.num_hidden_layers):
        a, b = f"{hf}encoder.layer.{number}.", f"{mcore}layers.{number}."
        for part in with_bias if config.attention_bias else ("weight",):
            split = [ledger.take(f"{a}attention.{x}_proj.{part}") for x in "qkv"]
            per_head = [x.reshape(heads, -1, *x.shape[1:]) for x in split]
            ledger.put(f"{b}attention.linear_qkv.{part}", torch.cat(per_head, 1).flatten(0, 1))
        if config.use_qk_norm:
            for x in "qk":
                ledger.move(f"{a}attention.{x}_norm.weight", f"{b}attention.{x}_norm.weight")
        for part in with_bias:
            ledger.move(f"{a}attention.projection_layer.{part}", f"{b}attention.linear_proj.{part}")
            ledger.move(f"{a}mlp.fc1.{part}", f"{b}linear_fc1.{part}")
            ledger.move(f"{a}mlp.fc2.{part}", f"{b}linear_fc2.{part}")
        for part in with_bias if config.norm_type == "layer_norm" else ("weight",):
            ledger.move(f"{a}layernorm_before.{part}", f"{b}norm1.{part}")
            ledger.move(f"{a}layernorm_after.{part}", f"{b}norm2.{part}")
        ledger.move(f"{a}lambda_1", f"{b}scale1")
        ledger.move(f"{a}lambda_2", f"{b}scale2")


def copy_attention(ledger: Ledger, text, hf: str, mcore: str) -> None:
    """mcore rows of query head i of a group: [query, gate, i-th slice of the key, of the value]."""
    heads = text.num_attention_heads
    split = [ledger.take(f"{hf}{x}_proj.weight") for x in "qkv"]
    rows = torch.cat([x.reshape(heads, -1, x.shape[-1]) for x in split], dim=1)
    ledger.put(mcore + "linear_qkv.weight", rows.flatten(0, 1))
    ledger.move(hf + "o_proj.weight", mcore + "linear_proj.weight")
    ledger.move(hf + "q_norm.weight", mcore + "q_norm.weight")
    ledger.move(hf + "k_norm.weight", mcore + "k_norm.weight")


def copy_gdn(ledger: Ledger, text, hf: str, mcore: str) -> None:
    """Rows of a key head are [q, k, v, z, b, a] in mcore. Qwen3-Next has two hf tensors by key
    head, [q, k, v, z] and [b, a]; Qwen3.5-MoE has all q, all k, all v in one, z, b and a in one
    each. Channels of the convolution are [q, k, v] by key head in mcore, all q, all k, all v in
    hf."""
    heads = text.linear_num_key_heads
    key_rows = heads * text.linear_key_head_dim

    def kinds(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return qkv.split([key_rows, key_rows, len(qkv) - 2 * key_rows])

    def by_head(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([x.reshape(heads, -1, x.shape[-1]) for x in parts], dim=1).flatten(0, 1)

    separate = text.model_type == "qwen3_5_moe_text"
    names = ("qkv", "z", "b", "a") if separate else ("qkvz", "ba")
    parts = [ledger.take(f"{hf}in_proj_{name}.weight") for name in names]
    if separate:
        parts = [*kinds(parts[0]), *parts[1:]]
    ledger.put(mcore + "in_proj.weight", by_head(parts))
    conv = ledger.take(hf + "conv1d.weight").squeeze(1)
    ledger.put(mcore + "conv_weight", by_head(kinds(conv)))
    ledger.move(hf + "A_log", mcore + "A_log")
    ledger.move(hf + "dt_bias", mcore + "dt_bias")
    ledger.move(hf + "norm.weight", mcore + "out_norm.weight")
    ledger.move(hf + "out_proj.weight", mcore + "out_proj.weight")


def copy_experts(ledger: Ledger, hf: str, mcore: str) -> None:
    ledger.move(hf + "gate.weight", mcore + "router.weight")
    ledger.move(hf + "experts.gate_up_proj", mcore + "experts.gate_up")
    ledger.move(hf + "experts.down_proj", mcore + "experts.down")
    ledger.move(hf + "shared_expert_gate.weight", mcore + "shared_experts.gate_weight")
    shared = mcore + "shared_experts."
    halves = [ledger.take(f"{hf}shared_expert.{x}_proj.weight") for x in ("gate", "up")]
    ledger.put(shared + "linear_fc1.weight", torch.cat(halves))
    ledger.move(hf + "shared_expert.down_proj.weight", shared + "linear_fc2.weight")

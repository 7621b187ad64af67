"""A small random transformers model, and its weights copied into ours by explicit transforms.

Written for tests and independent of the product's converter, so that one can check the other.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration

from megatron_mm.config import ModelConfig, to_transformers_dict, without_clvr

IMAGE_TOKEN = 95  # the last of the small models' vocabulary of 96; random text avoids it
OURS_ALONE = ("language.looks.", "vision.memory_proj.")  # CLVR: transformers has no such thing


def transformers_model(model: ModelConfig, seed: int = 0) -> InternVLForConditionalGeneration:
    """The base model (without looks) as transformers builds it: fp32, eager attention, eval
    mode, and no parameter at its default, where a mistake could hide."""
    base = replace(model, hybrid_layer_pattern=without_clvr(model.hybrid_layer_pattern))
    keywords = to_transformers_dict(base, image_token_id=IMAGE_TOKEN)
    keywords.pop("model_type")
    config = InternVLConfig(**keywords)
    # "eager" for the experts too: the default groups them into one product whose fp32 result
    # depends on how rows are batched.
    hf = InternVLForConditionalGeneration._from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    randomise(hf, seed)
    return hf.eval().requires_grad_(False)


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Every parameter off its default, at a scale that keeps activations of order one."""
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
            # The branches add a little to the residual stream, as in a trained model: a norm
            # of a nearly cancelled vector otherwise magnifies rounding tenfold per layer.
            branch = any(part in name for part in ("out_proj", "o_proj", "down_proj"))
            param.normal_(0.0, (0.3 if branch else 1.0) * fan_in**-0.5, generator=g)


class Ledger:
    """Takes every transformers tensor once and sets every parameter of ours once."""

    def __init__(self, hf: nn.Module, ours: nn.Module):
        self.left = dict(hf.named_parameters())
        self.unset = {n: p for n, p in ours.named_parameters() if not n.startswith(OURS_ALONE)}

    def take(self, name: str) -> torch.Tensor:
        return self.left.pop(name)  # KeyError: unknown, or taken before

    def put(self, name: str, value: torch.Tensor) -> None:
        target = self.unset.pop(name)  # KeyError: unknown, or set before
        assert target.numel() == value.numel(), f"{name}: {target.shape} from {value.shape}"
        # A view may have more dimensions than transformers' tensor (the halves of a GLU), but
        # a tensor of the right size and the wrong shape is a mistake.
        assert target.shape[-1] == value.shape[-1], f"{name}: {target.shape} from {value.shape}"
        with torch.no_grad():
            target.copy_(value.reshape(target.shape))

    def move(self, theirs: str, ours: str) -> None:
        self.put(ours, self.take(theirs))

    def close(self) -> None:
        assert not self.left, f"not consumed: {sorted(self.left)}"
        assert not self.unset, f"never set: {sorted(self.unset)}"


def copy_weights(hf: InternVLForConditionalGeneration, ours: nn.Module) -> None:
    """Fill our whole model (one rank, one stage) from transformers'. CLVR's own stay."""
    text, vision = hf.config.text_config, hf.config.vision_config
    ledger = Ledger(hf, ours)
    copy_vision(ledger, vision, "model.vision_tower.", "vision.vit.")
    for theirs, mine in (("layer_norm", "norm"), ("linear_1", "linear_fc1")):
        for part in ("weight", "bias"):
            ledger.move(
                f"model.multi_modal_projector.{theirs}.{part}", f"vision.projector.{mine}.{part}"
            )
    for part in ("weight", "bias"):
        ledger.move(
            f"model.multi_modal_projector.linear_2.{part}", f"vision.projector.linear_fc2.{part}"
        )
    ledger.move("model.language_model.embed_tokens.weight", "embedding.weight")
    for number, kind in enumerate(text.layer_types):
        theirs = f"model.language_model.layers.{number}."
        mine = f"language.layers.{number}."
        ledger.move(theirs + "input_layernorm.weight", mine + "mixer.norm.weight")
        if kind == "linear_attention":
            copy_gdn(ledger, text, theirs + "linear_attn.", mine + "mixer.inner.")
        else:
            copy_attention(ledger, text, theirs + "self_attn.", mine + "mixer.inner.")
        ledger.move(theirs + "post_attention_layernorm.weight", mine + "moe.norm.weight")
        copy_experts(ledger, theirs + "mlp.", mine + "moe.inner.")
    ledger.move("model.language_model.norm.weight", "final_norm.weight")
    ledger.move("lm_head.weight", "output_layer.weight")
    ledger.close()


def copy_vision(ledger: Ledger, config, theirs: str, ours: str) -> None:
    ledger.move(theirs + "embeddings.cls_token", ours + "embedding.class_token")
    ledger.move(theirs + "embeddings.position_embeddings", ours + "embedding.positions")
    projection = theirs + "embeddings.patch_embeddings.projection."
    ledger.move(projection + "weight", ours + "embedding.patch_weight")
    ledger.move(projection + "bias", ours + "embedding.patch_bias")
    heads = config.num_attention_heads
    with_bias = ("weight", "bias")
    for number in range(config.num_hidden_layers):
        a, b = f"{theirs}encoder.layer.{number}.", f"{ours}layers.{number}."
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


def copy_attention(ledger: Ledger, text, theirs: str, ours: str) -> None:
    """Ours per query head i of a group: [query, gate, i-th slice of the key, of the value]."""
    heads = text.num_attention_heads
    split = [ledger.take(f"{theirs}{x}_proj.weight") for x in "qkv"]
    rows = torch.cat([x.reshape(heads, -1, x.shape[-1]) for x in split], dim=1)
    ledger.put(ours + "linear_qkv.weight", rows.flatten(0, 1))
    ledger.move(theirs + "o_proj.weight", ours + "linear_proj.weight")
    ledger.move(theirs + "q_norm.weight", ours + "q_norm.weight")
    ledger.move(theirs + "k_norm.weight", ours + "k_norm.weight")


def copy_gdn(ledger: Ledger, text, theirs: str, ours: str) -> None:
    """Ours per key head: [q, k, v, z, b, a]. Qwen3-Next's: [q, k, v, z] apart from [b, a], each per
    key head; Qwen3.5-MoE's: all q, all k, all v in one tensor, z, b and a in one each. The
    convolution's channels are per key head [q, k, v], theirs all q, all k, all v."""
    heads = text.linear_num_key_heads
    key_rows = heads * text.linear_key_head_dim

    def kinds(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return qkv.split([key_rows, key_rows, len(qkv) - 2 * key_rows])

    def by_head(parts) -> torch.Tensor:
        return torch.cat([x.reshape(heads, -1, x.shape[-1]) for x in parts], dim=1).flatten(0, 1)

    separate = text.model_type == "qwen3_5_moe_text"
    names = ("qkv", "z", "b", "a") if separate else ("qkvz", "ba")
    parts = [ledger.take(f"{theirs}in_proj_{name}.weight") for name in names]
    if separate:
        parts = [*kinds(parts[0]), *parts[1:]]
    ledger.put(ours + "in_proj.weight", by_head(parts))
    conv = ledger.take(theirs + "conv1d.weight").squeeze(1)
    ledger.put(ours + "conv_weight", by_head(kinds(conv)))
    ledger.move(theirs + "A_log", ours + "A_log")
    ledger.move(theirs + "dt_bias", ours + "dt_bias")
    ledger.move(theirs + "norm.weight", ours + "out_norm.weight")
    ledger.move(theirs + "out_proj.weight", ours + "out_proj.weight")


def copy_experts(ledger: Ledger, theirs: str, ours: str) -> None:
    ledger.move(theirs + "gate.weight", ours + "router.weight")
    ledger.move(theirs + "experts.gate_up_proj", ours + "experts.gate_up")
    ledger.move(theirs + "experts.down_proj", ours + "experts.down")
    ledger.move(theirs + "shared_expert_gate.weight", ours + "shared_experts.gate_weight")
    shared = ours + "shared_experts."
    halves = [ledger.take(f"{theirs}shared_expert.{x}_proj.weight") for x in ("gate", "up")]
    ledger.put(shared + "linear_fc1.weight", torch.cat(halves))
    ledger.move(theirs + "shared_expert.down_proj.weight", shared + "linear_fc2.weight")

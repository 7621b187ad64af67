"""Small models and random microbatches, made without files and without a tokenizer."""

from __future__ import annotations

import torch

from megatron_mm.config import FusionConfig, ModelConfig, RunConfig
from megatron_mm.data.batch import Microbatch
from megatron_mm.model.families.internvit.settings import InternViTSettings
from megatron_mm.model.families.qwen3_5_moe.settings import Qwen35MoeSettings
from megatron_mm.model.families.qwen3_next.settings import Qwen3NextSettings

# Megatron's settings for the sizes of a layout, by their usual short names.
SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}


def small_model(pattern: str = "GE L *E GE L J *E J", **fusion) -> ModelConfig:
    """Returns a model with every kind of layer and two look/inject pairs in flight at once.

    Its sizes differ from each other where they may, so that a swapped dimension is an error.
    """
    return ModelConfig(
        hybrid_layer_pattern=pattern,
        language=Qwen3NextSettings(
            vocab_size=96,
            hidden_size=64,
            num_attention_heads=8,
            num_query_groups=2,
            kv_channels=24,
            rotary_base=10000.0,
            rotary_percent=0.5,
            linear_key_head_dim=12,
            linear_value_head_dim=20,
            linear_num_key_heads=4,
            linear_num_value_heads=8,
            num_experts=6,
            moe_router_topk=2,
            moe_ffn_hidden_size=28,
            moe_shared_expert_intermediate_size=36,
            moe_aux_loss_coeff=0.01,
            init_method_std=0.1,
        ),
        vision=InternViTSettings(
            vision_num_layers=2,
            vision_hidden_size=40,
            vision_ffn_hidden_size=72,
            vision_num_attention_heads=5,
            vision_layer_scale_init=1.0,
            vision_init_method_std=0.1,
            image_size=16,
            patch_size=4,
        ),
        fusion=FusionConfig(
            **{
                "image_stream": "thumbnail",
                "vision_memory": "tiles",
                "memory_hidden_size": 32,
                "clvr_num_attention_heads": 4,
                "clvr_kv_channels": 16,
            }
            | fusion
        ),
    )


def small_qwen3_5_moe(pattern: str = "GE L *E GE L J *E J", **fusion) -> ModelConfig:
    """The same sizes as Qwen3.5-MoE's text model; no two sections of the rotary embedding alike."""
    model = small_model(pattern, **fusion)
    sizes = {name: value for name, value in vars(model.language).items() if name != "type"}
    model.language = Qwen35MoeSettings(**sizes, mrope_section=[3, 1, 2])
    return model


SMALL_MODELS = {"qwen3_next": small_model, "qwen3_5_moe": small_qwen3_5_moe}


def small_run(pattern: str = "GE L *E GE L J *E J", **fusion) -> RunConfig:
    """Returns a run of `small_model` with a seed of its own."""
    run = RunConfig(model=small_model(pattern, **fusion))
    run.training.seed = 7
    return run


def aligned_run(fp8_recipe: str | None = None, transformer_impl: str = "transformer_engine"):
    """Returns a run in bf16 whose sizes suit every FP8 recipe, mxfp8 included.

    A token goes to all experts. If it went to some, rounding would change which, and two runs would
    soon differ.
    """
    run = small_run()
    language = run.model.language
    language.num_query_groups, language.kv_channels = 2, 32
    language.linear_num_key_heads, language.linear_num_value_heads = 8, 16
    language.linear_key_head_dim = language.linear_value_head_dim = 16
    language.moe_router_topk = language.num_experts
    language.moe_ffn_hidden_size = language.moe_shared_expert_intermediate_size = 32
    run.training.bf16 = True
    run.backend.transformer_impl = transformer_impl
    if fp8_recipe is not None:
        run.backend.fp8_format, run.backend.fp8_recipe = "hybrid", fp8_recipe
    return run


def microbatch(
    model: ModelConfig, seed: int, images: tuple[int, ...] = (1, 0, 2), pad_multiple: int = 1
) -> Microbatch:
    """Returns a sample for each entry of `images`, which counts its images.

    An image is two tiles and a thumbnail. The last third of every sample is supervised.
    """
    g = torch.Generator().manual_seed(seed)
    vision, fusion = model.vision, model.fusion
    side = vision.image_size // vision.patch_size
    stream_tokens = (side // fusion.pixel_shuffle_factor) ** 2
    tokens, labels, mask, positions, cu = [], [], [], [], [0]
    stream_tiles, stream_positions, memory_tiles, visible, coordinates = [], [], [], [], []
    tiles = 0
    for count in images:
        length = int(torch.randint(14, 30, (), generator=g)) + 7 * count
        start, cursor, sees = cu[-1], cu[-1] + 1, []
        for _ in range(count):
            stream_tiles.append(tiles + 2)
            stream_positions += range(cursor, cursor + stream_tokens)
            cursor += stream_tokens + 1
            memory_tiles += [tiles, tiles + 1]
            sees += [cursor - 1] * (2 * side * side)
            tiles += 3
            y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
            for tile in range(2):
                grid = torch.stack(((y + 0.5) / side, (x + 0.5 + tile * side) / (2 * side)), -1)
                coordinates.append(grid.reshape(-1, 2))
        tokens.append(torch.randint(0, model.language.vocab_size, (length,), generator=g))
        labels.append(torch.randint(0, model.language.vocab_size, (length,), generator=g))
        supervised = torch.zeros(length)
        supervised[-length // 3 : -1] = 1
        mask.append(supervised)
        positions.append(torch.arange(length))
        cu.append(start + length)
        visible += [(first, cu[-1]) for first in sees]
    real = cu[-1]
    tail = -real % pad_multiple
    if tail:
        for parts, fill in ((tokens, 0), (labels, 0), (positions, 0)):
            parts.append(torch.full((tail,), fill))
        mask.append(torch.zeros(tail))
        cu.append(real + tail)
    return Microbatch(
        tokens_T=torch.cat(tokens),
        labels_T=torch.cat(labels),
        loss_mask_T=torch.cat(mask),
        position_ids_T=torch.cat(positions),
        cu_seqlens=torch.tensor(cu),
        num_real_tokens=real,
        pixels_NCHW=torch.randn(tiles, 3, vision.image_size, vision.image_size, generator=g),
        stream_tiles=torch.tensor(stream_tiles, dtype=torch.int64),
        stream_positions=torch.tensor(stream_positions, dtype=torch.int64),
        memory_tiles=torch.tensor(memory_tiles, dtype=torch.int64),
        memory_coordinates_M2=torch.cat(coordinates) if coordinates else torch.zeros(0, 2),
        memory_visible_M2=torch.tensor(visible, dtype=torch.int64).reshape(-1, 2),
        samples=[f"synthetic:{i}" for i in range(len(images))],
    )

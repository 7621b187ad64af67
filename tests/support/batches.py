"""Small models and random microbatches, made without files and without a tokenizer."""

from __future__ import annotations

from dataclasses import fields

import torch

from megatron_mm.config import FusionConfig, MemoryConfig, ModelConfig, RunConfig, memories
from megatron_mm.config.layers.queries import query_settings
from megatron_mm.data.batch import BatchMemory, BatchQueries, Microbatch
from megatron_mm.model.families.internvit.settings import InternViTSettings
from megatron_mm.model.families.qwen3_5_moe.settings import Qwen35MoeSettings
from megatron_mm.model.families.qwen3_next.settings import Qwen3NextSettings
from support.samples import random_pixels

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


def two_memories(*reads: str) -> dict:
    """Settings of a coarse memory and a fine one, of different widths; `reads` are the memories
    of the looks."""
    return {
        "vision_memory": "none",
        "memories": {
            "overview": MemoryConfig("thumbnail", 16),
            "detail": MemoryConfig("tiles", 32),
        },
        "look_memories": list(reads),
    }


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
    """Returns a sample for each entry of `images`, which counts its images. Their thumbnails are in
    the stream.

    An image is two tiles and a thumbnail. The last third of every sample is supervised. A model
    with glimpses gets queries in every sample with images, as many as fit.
    """
    g = torch.Generator().manual_seed(seed)
    vision, fusion = model.vision, model.fusion
    side = vision.image_size // vision.patch_size
    stream_tokens = (side // fusion.pixel_shuffle_factor) ** 2
    asking = query_settings(model)
    tokens, labels, mask, lengths = [], [], [], []
    stream_tiles, stream_positions = [], []
    held = {memory.name: ([], [], [], []) for memory in memories(model)}
    tiles = start = 0
    queries, targets = [], []
    for count in images:
        length = int(torch.randint(14, 30, (), generator=g)) + 7 * count
        cursor = start + 1
        for _ in range(count):
            stream_tiles.append(tiles + 2)
            stream_positions += range(cursor, cursor + stream_tokens)
            cursor += stream_tokens + 1
            y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
            for memory in memories(model):
                chosen, coordinates, extents, visible = held[memory.name]
                taken = {"tiles": (0, 1), "thumbnail": (2,), "pyramid": (0, 1, 2)}[memory.tiles]
                chosen += [tiles + tile for tile in taken]
                for tile in taken:
                    columns, column = (1, 0) if tile == 2 else (2, tile)
                    right = (x + 0.5 + column * side) / (columns * side)
                    grid = torch.stack(((y + 0.5) / side, right), -1)
                    coordinates.append(grid.reshape(-1, 2))
                    extents.append(torch.full((side * side,), columns**-0.5 / side))
                seen = torch.tensor([cursor - 1, start + length])
                visible.append(seen.expand(len(taken) * side * side, 2))
            tiles += 3
        tokens.append(torch.randint(0, model.language.vocab_size, (length,), generator=g))
        labels.append(torch.randint(0, model.language.vocab_size, (length,), generator=g))
        supervised = torch.zeros(length)
        supervised[-length // 3 : -1] = 1
        mask.append(supervised)
        lengths.append(length)
        if asking is not None and count:
            # Behind the last image, one after the other and up to the sample's end.
            last = start + length - 1 - asking.slots
            first = cursor + (last - cursor) % (asking.slots + 1)
            positions = range(first, last + 1, asking.slots + 1)
            queries += positions
            targets += [(0.3, 0.6, 0.5) if n % 2 else None for n in positions]
        start += length
    return Microbatch.build(
        torch.cat(tokens),
        lengths,
        labels_T=torch.cat(labels),
        loss_mask_T=torch.cat(mask),
        pad_multiple=pad_multiple,
        pixels_NCHW=random_pixels(tiles, vision.image_size, g),
        stream_tiles=stream_tiles,
        stream_positions=torch.tensor(stream_positions, dtype=torch.int64),
        memories={name: BatchMemory.build(*parts) for name, parts in held.items()},
        queries=BatchQueries.build(queries, targets),
        samples=[f"synthetic:{i}" for i in range(len(images))],
    )


def values_of(batch: Microbatch) -> dict[str, object]:
    """Every value of a microbatch by name; those of its memories as `memories.vision.tiles`."""
    found = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if field.name == "memories":
            for name, held in value.items():
                found |= {f"memories.{name}.{f.name}": getattr(held, f.name) for f in fields(held)}
        elif field.name == "queries":
            found |= {f"queries.{f.name}": getattr(value, f.name) for f in fields(value)}
        else:
            found[field.name] = value
    return found

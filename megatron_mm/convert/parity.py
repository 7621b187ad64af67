"""Compares a checkpoint with a Hugging Face folder: bits of every tensor, output of every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_mm.checkpoint.compatible import CARRIED_PREFIX, check_model
from megatron_mm.checkpoint.shards import weight_key
from megatron_mm.config import DataConfig, RunConfig, effective_pattern, num_layers, to_dict
from megatron_mm.config.layers.queries import query_settings
from megatron_mm.convert.export_inputs import has_clvr
from megatron_mm.convert.folder import HFFolder, equal_bits
from megatron_mm.convert.live import fill
from megatron_mm.convert.mapping import StateMapping
from megatron_mm.convert.to_hf import Checkpoint
from megatron_mm.data.collate import collate
from megatron_mm.data.images import normalise
from megatron_mm.data.looks import LookTokens
from megatron_mm.data.sample import Sample, SampleBuilder, SampleImage
from megatron_mm.data.tiles import (
    ImageSettings,
    choose_grids,
    image_settings,
    tiles_by_images,
)
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.errors import ConvertError
from megatron_mm.model.multimodal import MultimodalModel, build
from megatron_mm.parallel.groups import Groups
from megatron_mm.parallel.param_layout import layouts

# fp32 rounds at 6e-8. Ten sub-layers measured up to 1.5e-6 (tests/model/test_parity.py); a swapped
# head or expert gives 1e-2 or more.
TOLERANCE = 1e-5
# (columns, rows) of the built-in images in tiles: a single tile, and a grid with a thumbnail.
BUILT_IN = ((1, 1), (3, 1))


def differing_tensors(
    source: HFFolder, mapping: StateMapping, checkpoint: Checkpoint
) -> Iterator[str]:
    """Yields one line for each hf tensor that the checkpoint does not reproduce bitwise.

    Raises:
        CheckpointError: the models differ, or the checkpoint is damaged.
    """
    check_model(to_dict(source.model), checkpoint.model, finetune=True)
    reader = checkpoint.reader
    for link in mapping.links:
        key = weight_key(link.mcore)
        ranges = reader.ranges(key) if link.counted else [(0, link.shape[0])]
        for first, last in ranges:
            mcore = reader.read(key, first, last) if link.counted else reader.read(key)
            for name, tensor in link.to_hf(mcore, first):
                whole = not link.counted or link.separate
                hf = source.read(name, *((None, None) if whole else (first, last)))
                if not equal_bits(tensor, hf):
                    yield f"{name} differs from {link.mcore}: {_how(tensor, hf)}"
    for name in mapping.carried:
        if name not in checkpoint.carried:
            yield f"{name} is not in the checkpoint"
        elif not equal_bits(reader.read(CARRIED_PREFIX + name), source.read(name, None, None)):
            yield f"{name} differs from what was carried along"


def _how(a: torch.Tensor, b: torch.Tensor) -> str:
    if a.dtype != b.dtype:
        return f"{a.dtype} there, {b.dtype} in the folder"
    return f"by up to {float((a.double() - b.double()).abs().max()):.3g}"


@dataclass(frozen=True)
class Case:
    """Prompt to compare outputs on."""

    sample: Sample
    name: str


def built_in_cases(
    run: RunConfig,
    image_token_id: int | None,
    look_ids: Sequence[int] | None = None,
    seed: int = 0,
) -> list[Case]:
    """Returns a prompt of random text, and prompts of random images between random text. A model
    that glimpses gets queries behind images, and a prompt of two images with one behind each.

    Args:
        look_ids: those of `look_names`, of a model that glimpses.
    """
    g = torch.Generator().manual_seed(seed)
    size = run.model.language.vocab_size
    settings = query_settings(run.model)
    asking = None
    if settings is not None and look_ids is not None:
        asking = LookTokens.known(settings, *look_ids)
    reserved = {image_token_id, *(look_ids or ())}
    ordinary = torch.tensor([t for t in range(size) if t not in reserved])

    def words(count: int) -> list[int]:
        return ordinary[torch.randint(0, len(ordinary), (count,), generator=g)].tolist()

    def place() -> list[int]:
        """Words that say where a query looks, if words do."""
        if asking is None or asking.words is None:
            return []
        return asking.words.spell(torch.rand(3, generator=g).clamp(asking.min_scale).tolist())

    def looks(count: int, most: int) -> list[int]:
        """Queries, one behind the other, and their slots."""
        if asking is None:
            return []
        slots = [asking.slot_id] * asking.slots
        each = ([*place(), asking.query_id, *slots] for _ in range(min(count, most)))
        return [token for tokens in each for token in tokens]

    cases = [Case(_sample(words(24), []), "text")]
    vision = image_settings(run)
    if vision is None:
        return cases
    assert image_token_id is not None  # a model with vision has one
    shown = [(one,) for one in BUILT_IN]
    for sizes in shown if asking is None else [*shown, BUILT_IN]:
        tokens, images = words(8), []
        most = 0 if asking is None else asking.most // len(sizes)  # behind each image
        for columns, rows in sizes:
            image = _image((columns, rows), vision, len(tokens), g)
            images.append(image)
            tokens += [image_token_id] * (len(image.stream) * vision.tokens_per_tile)
            tokens += [*words(4), *looks(1, most), *words(4), *looks(2, most - 1), *words(4)]
        count = sum(image.grid.num_tiles for image in images)
        sample = _sample(tokens, images, asking)
        cases.append(Case(sample, f"{count} tiles"))
    return cases


def _image(
    cells: tuple[int, int], settings: ImageSettings, start: int, g: torch.Generator
) -> SampleImage:
    """A random image of (columns, rows) tiles."""
    columns, rows = cells
    side = settings.image_size
    (grid,) = choose_grids([(columns * side, rows * side)], settings, "built-in image")
    tiles = torch.randint(0, 256, (grid.num_tiles, side, side, 3), generator=g)
    by_key = tiles_by_images(grid, settings).items()
    held = {key: tiles[used].to(torch.uint8).numpy() for key, used in by_key}
    return SampleImage.build(grid, held, settings, start)


def given_case(run: RunConfig, tokenizer: Tokenizer, prompt: str, image: Path | None) -> Case:
    """Returns the user's prompt after the user's image, in the chat template.

    Raises:
        DataError: the image or the prompt cannot be used.
    """
    builder = SampleBuilder(run, tokenizer)
    images = []
    if image is not None:
        prompt, images = "<image>" + prompt, [image.name]
    row = {"messages": [{"role": "user", "content": prompt}], "images": images}
    folder = image.parent if image is not None else Path()
    return Case(builder.prompt(row, "--prompt", folder), "the given prompt")


def _sample(
    tokens: list[int],
    images: list[SampleImage],
    looks: LookTokens | None = None,
) -> Sample:
    ids = torch.tensor(tokens)
    asks = [] if looks is None else (ids == looks.query_id).nonzero().flatten().tolist()
    anywhere = [None] * len(asks)
    return Sample(
        ids,
        torch.zeros_like(ids),
        torch.zeros(len(ids)),
        images,
        "built in",
        queries=tuple(asks),
        targets=() if looks is None else looks.targets(ids, asks, anywhere),
        slots=0 if looks is None else looks.slots,
    )


def mcore_model(checkpoint: Checkpoint, groups: Groups) -> MultimodalModel:
    """Builds the checkpoint's model on one rank, in fp32."""
    run = RunConfig(model=checkpoint.model, data=DataConfig())
    model = build(run, groups.pg, drawn=False)[0].eval()
    read = checkpoint.reader.read
    for name, param, layout in layouts(model):
        fill(param, layout, partial(read, weight_key(name)))
    return model


@torch.no_grad()
def mcore_outputs(
    model: MultimodalModel, run: RunConfig, case: Case
) -> list[tuple[str, torch.Tensor]]:
    """Returns (name, output [T, H]) of every layer, then the logits [T, V]."""
    batch = collate([case.sample], settings=image_settings(run), pad_id=0)
    found: dict[int, torch.Tensor] = {}

    def watch(layer, hidden):
        if layer.number is not None:
            found[layer.number] = hidden[
                :, 0
            ].clone()  # of a layer's two sub-layers the later one stays

    model.watch = watch
    try:
        logits = model(batch).logits()
    finally:
        model.watch = None
    return [(f"layer {n}", found[n]) for n in sorted(found)] + [("logits", logits)]


@torch.no_grad()
def hf_outputs(hf, run: RunConfig, case: Case) -> list[tuple[str, torch.Tensor]]:
    """Returns what `mcore_outputs` does, from a transformers model."""
    settings = image_settings(run)
    batch = collate([case.sample], settings=settings, pad_id=0)
    inputs = {"input_ids": batch.tokens_T.unsqueeze(0), "use_cache": False}
    if settings is not None and len(batch.pixels_NCHW):
        pixels = normalise(batch.pixels_NCHW, settings.mean, settings.std)
        inputs["pixel_values"] = pixels
        if has_clvr(run.model):
            inputs |= clvr_inputs(batch)
        else:
            inputs["pixel_values"] = pixels[batch.stream_tiles]
    states: list[torch.Tensor] = []
    inner = hf.model.language_model if run.model.vision is not None else hf.model
    if hasattr(inner, "watch"):  # remote code of an export, whose layers are not modules
        inner.watch = lambda number, hidden: states.append((number, hidden[0]))
        try:
            logits = hf(**inputs).logits[0]
        finally:
            inner.watch = None
        last = dict(states)
        return [(f"layer {n}", last[n]) for n in sorted(last)] + [("logits", logits)]
    handles = [
        layer.register_forward_hook(lambda m, i, out: states.append(out[0]))
        for layer in inner.layers
    ]
    try:
        logits = hf(**inputs).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return [(f"layer {n}", s) for n, s in enumerate(states)] + [("logits", logits)]


def clvr_inputs(batch) -> dict[str, torch.Tensor]:
    """Returns the inputs of an export's remote code other than pixels, for a batch of one sample:
    the memories one after the other."""
    held = list(batch.memories.values())
    counts = torch.tensor([len(memory.tiles) for memory in held])
    visible_from = torch.cat([memory.visible_M2[:, 0] for memory in held])
    return {
        "stream_tiles": batch.stream_tiles,
        "memory_tiles": torch.cat([memory.tiles for memory in held]),
        "memory_number": torch.arange(len(held)).repeat_interleave(counts),
        "memory_coordinates": torch.cat([memory.coordinates_M2 for memory in held]),
        "memory_extents": torch.cat([memory.extents_M for memory in held]),
        "memory_sample": torch.zeros_like(visible_from),
        "memory_visible_from": visible_from,
    }


@dataclass(frozen=True)
class Difference:
    """Relative difference ||mcore - hf|| / ||hf|| of one output."""

    case: str
    where: str
    size: float


def compare_outputs(
    checkpoint: Checkpoint, mcore: MultimodalModel, hf, run: RunConfig, cases: list[Case]
) -> Iterator[Difference]:
    """Yields the difference of every output in the order of the model, case by case.

    Raises:
        ConvertError: the models have different numbers of layers.
    """
    layers = num_layers(effective_pattern(run.model))
    for case in cases:
        a, b = mcore_outputs(mcore, run, case), hf_outputs(hf, run, case)
        if [name for name, _ in a] != [name for name, _ in b] or len(a) != layers + 1:
            raise ConvertError(f"{checkpoint.path}: {len(a) - 1} layers here, {len(b) - 1} there")
        for (name, x), (_, y) in zip(a, b, strict=True):
            yield Difference(case.name, name, float((x - y).norm() / y.norm()))

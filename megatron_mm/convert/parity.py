"""Does a checkpoint hold a folder's model? Every tensor's bits, then every layer's output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_mm.checkpoint.compatible import CARRIED_PREFIX, check_model
from megatron_mm.checkpoint.shards import weight_key
from megatron_mm.config import DataConfig, RunConfig, effective_pattern, parse_pattern, to_dict
from megatron_mm.convert.export import has_clvr
from megatron_mm.convert.folder import HFFolder, equal_bits
from megatron_mm.convert.live import fill
from megatron_mm.convert.mapping import StateMapping
from megatron_mm.convert.to_hf import Checkpoint
from megatron_mm.data.collate import collate
from megatron_mm.data.sample import Sample, SampleBuilder, SampleImage
from megatron_mm.data.tiles import image_settings, plan_images, used_tiles
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.errors import ConvertError
from megatron_mm.model.multimodal import MultimodalModel, build
from megatron_mm.parallel.groups import Groups
from megatron_mm.parallel.param_layout import layouts

# fp32 rounds at 6e-8 in either order; ten sub-layers were measured at up to 1.5e-6
# (tests/model/test_parity.py), and a swapped head or expert gives 1e-2 and more.
TOLERANCE = 1e-5
# Width and height of the built-in images, in tiles: one, and a grid with a thumbnail.
BUILT_IN = ((1, 1), (3, 1))


def differing_tensors(
    source: HFFolder, plan: StateMapping, checkpoint: Checkpoint
) -> Iterator[str]:
    """One line for each tensor of theirs that the checkpoint does not give back to the bit."""
    check_model(to_dict(source.model), checkpoint.model, finetune=True)
    reader = checkpoint.reader
    for link in plan.links:
        key = weight_key(link.mcore)
        ranges = reader.ranges(key) if link.counted else [(0, link.shape[0])]
        for first, last in ranges:
            ours = reader.read(key, first, last) if link.counted else reader.read(key)
            for name, tensor in link.to_hf(ours, first):
                whole = not link.counted or link.separate
                theirs = source.read(name, *((None, None) if whole else (first, last)))
                if not equal_bits(tensor, theirs):
                    yield f"{name} differs from {link.mcore}: {_how(tensor, theirs)}"
    for name in plan.carried:
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
    """A prompt as our data room makes it."""

    sample: Sample
    name: str


def built_in_cases(run: RunConfig, image_token_id: int | None, seed: int = 0) -> list[Case]:
    """Random text, and random images of several tile counts between random text."""
    g = torch.Generator().manual_seed(seed)
    size = run.model.language.vocab_size

    def words(count: int) -> list[int]:
        found = torch.randint(0, size, (count,), generator=g).tolist()
        return [t if t != image_token_id else (t + 1) % size for t in found]

    cases = [Case(_sample(words(24), []), "text")]
    settings = image_settings(run)
    for columns, rows in BUILT_IN if settings else ():
        side = settings.image_size
        pixels = (columns * side, rows * side)
        (plan,) = plan_images([pixels], settings, "built-in image")
        tiles = torch.randint(0, 256, (plan.num_tiles, side, side, 3), generator=g)
        cells = tiles[used_tiles(plan, settings)].to(torch.uint8).numpy()
        tokens = words(8)
        image = SampleImage.of(plan, cells, settings, len(tokens))
        count = len(image.stream) * settings.tokens_per_tile
        tokens += [image_token_id] * count + words(12)
        cases.append(Case(_sample(tokens, [image]), f"{plan.num_tiles} tiles"))
    return cases


def given_case(run: RunConfig, tokenizer: Tokenizer, prompt: str, image: Path | None) -> Case:
    """The user's prompt after the user's image, as a chat. Raises DataError."""
    builder = SampleBuilder(run, tokenizer)
    images = []
    if image is not None:
        prompt, images = "<image>" + prompt, [image.name]
    row = {"messages": [{"role": "user", "content": prompt}], "images": images}
    folder = image.parent if image is not None else Path()
    return Case(builder.prompt(row, "--prompt", folder), "the given prompt")


def _sample(tokens: list[int], images: list[SampleImage]) -> Sample:
    ids = torch.tensor(tokens)
    return Sample(ids, torch.zeros_like(ids), torch.zeros(len(ids)), images, "built in")


def our_model(checkpoint: Checkpoint, groups: Groups) -> MultimodalModel:
    """On one rank, in fp32."""
    run = RunConfig(model=checkpoint.model, data=DataConfig())
    model = build(run, groups.pg)[0].eval()
    read = checkpoint.reader.read
    for name, param, layout in layouts(model):
        fill(param, layout, partial(read, weight_key(name)))
    return model


@torch.no_grad()
def our_outputs(
    model: MultimodalModel, run: RunConfig, case: Case
) -> list[tuple[str, torch.Tensor]]:
    """(name, output) of every layer, then the logits."""
    batch = collate([case.sample], settings=image_settings(run), pad_id=0)
    found: dict[int, torch.Tensor] = {}

    def watch(layer, hidden):
        if layer.number is not None:
            found[layer.number] = hidden[:, 0].clone()  # the later of a layer's two stays

    model.watch = watch
    try:
        logits = model(batch)[:, 0]
    finally:
        model.watch = None
    return [(f"layer {n}", found[n]) for n in sorted(found)] + [("logits", logits)]


@torch.no_grad()
def their_outputs(hf, run: RunConfig, case: Case) -> list[tuple[str, torch.Tensor]]:
    """The same of a transformers model."""
    batch = collate([case.sample], settings=image_settings(run), pad_id=0)
    inputs = {"input_ids": batch.tokens_T.unsqueeze(0), "use_cache": False}
    if len(batch.pixels_NCHW):
        inputs["pixel_values"] = batch.pixels_NCHW
        if has_clvr(run.model):
            inputs |= clvr_inputs(batch)
        else:
            inputs["pixel_values"] = batch.pixels_NCHW[batch.stream_tiles]
    states: list[torch.Tensor] = []
    inner = hf.model.language_model if run.model.vision is not None else hf.model
    if hasattr(inner, "watch"):  # the code of an export, which calls no layer as a whole
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
    """What the remote code of an export takes beside the pixels, for a batch of one sample."""
    visible = batch.memory_visible_M2
    return {
        "stream_tiles": batch.stream_tiles,
        "memory_tiles": batch.memory_tiles,
        "memory_coordinates": batch.memory_coordinates_M2,
        "memory_sample": torch.zeros(len(visible), dtype=torch.int64),
        "memory_visible_from": visible[:, 0],
    }


@dataclass(frozen=True)
class Difference:
    """||ours - theirs|| / ||theirs|| of one output."""

    case: str
    where: str
    size: float


def compare_outputs(
    checkpoint: Checkpoint, ours: MultimodalModel, theirs, run: RunConfig, cases: list[Case]
) -> Iterator[Difference]:
    """In the order of the model, for one case after the other."""
    layers = sum(layer.kind in "G*" for layer in parse_pattern(effective_pattern(run.model)))
    for case in cases:
        a, b = our_outputs(ours, run, case), their_outputs(theirs, run, case)
        if [name for name, _ in a] != [name for name, _ in b] or len(a) != layers + 1:
            raise ConvertError(f"{checkpoint.path}: {len(a) - 1} layers here, {len(b) - 1} there")
        for (name, x), (_, y) in zip(a, b, strict=True):
            yield Difference(case.name, name, float((x - y).norm() / y.norm()))

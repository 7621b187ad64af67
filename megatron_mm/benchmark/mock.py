"""Mock data: steps in memory with random words and pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from megatron_mm.benchmark.models import cut_image, image_token
from megatron_mm.config import ModelConfig, RunConfig, route_width, token_multiple
from megatron_mm.config.memories import most_tiles
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.collate import collate
from megatron_mm.data.sample import Sample
from megatron_mm.data.tiles import image_settings
from megatron_mm.engine.objective import Objective
from megatron_mm.model.routing import FREE


class Source(Protocol):
    """The part of a `train.source.StepSource` that is measured."""

    @property
    def objective(self) -> Objective[Any]: ...

    @property
    def metrics(self) -> Mapping[str, float]: ...

    @property
    def between(self) -> bool: ...

    def next_step(self, stop: bool) -> tuple[Sequence[Microbatch], bool]: ...

    def close(self) -> None: ...


class Mock:
    """Source that returns prepared steps in turn."""

    between = True

    def __init__(self, steps: Sequence[list[Microbatch]], objective: Objective):
        self.steps, self.given, self.objective = steps, 0, objective
        self.metrics: dict[str, float] = {}

    def next_step(self, stop: bool) -> tuple[list[Microbatch], bool]:
        self.given += 1
        return self.steps[(self.given - 1) % len(self.steps)], stop

    def close(self) -> None:
        self.steps = []


def mock_like(batch: Microbatch, vocab_size: int, seed: int) -> Microbatch:
    """Returns random words and pixels with the lengths, tiles and places of `batch`; the same on
    ranks with the same seed."""
    g = torch.Generator().manual_seed(seed)
    words = torch.randint(0, vocab_size, batch.tokens_T.shape, generator=g)
    labels = torch.randint(0, vocab_size, batch.labels_T.shape, generator=g)
    words[batch.stream_positions] = batch.tokens_T[batch.stream_positions]
    return replace(
        batch,
        tokens_T=words,
        labels_T=labels,
        pixels_NCHW=torch.randint(
            0, 256, batch.pixels_NCHW.shape, generator=g, dtype=batch.pixels_NCHW.dtype
        ),
    )


def balanced(batch: Microbatch, layers: Sequence[int], model: ModelConfig) -> Microbatch:
    """Returns `batch` with routes whose first hop loads all experts of a layer equally, to within
    one token; a second hop is free."""
    k, experts = model.language.moe_router_topk, model.language.num_experts
    slots = torch.arange(len(batch.tokens_T) * k).view(-1, k) % experts
    beyond = (0, route_width(model) - k)
    routes = {
        layer: F.pad((slots + layer) % experts, beyond, value=FREE).to(torch.int16)
        for layer in layers
    }
    return replace(batch, routes=routes)


def made_step(run: RunConfig, microbatches: int, seed: int) -> list[Microbatch]:
    """Makes a step of full samples: `seq_length` tokens with one image of the most tiles."""
    rng = np.random.default_rng(seed)
    samples = [
        [_sample(run, rng) for _ in range(run.training.micro_batch_size)]
        for _ in range(microbatches)
    ]
    settings = image_settings(run) if run.model.vision is not None else None
    multiple = token_multiple(run)
    return [collate(s, settings=settings, pad_id=0, pad_multiple=multiple) for s in samples]


def _sample(run: RunConfig, rng: np.random.Generator) -> Sample:
    length, tokens, images = run.data.seq_length, [], []
    if (settings := image_settings(run)) is not None:
        tiles = most_tiles(run)
        columns = next(n for n in range(1, 100) if n * n >= tiles)
        while tiles % columns:
            columns += 1
        rows, size = tiles // columns, settings.image_size
        pixels = rng.integers(0, 256, (rows * size, columns * size, 3), dtype=np.uint8)
        image = cut_image(Image.fromarray(pixels), settings, 0)
        tokens = [image_token(run)] * (len(image.stream) * settings.tokens_per_tile)
        images.append(image)
    words = rng.integers(0, image_token(run), max(2, length - len(tokens)))
    tokens = torch.tensor([*tokens, *words], dtype=torch.int64)
    mask = torch.zeros(len(tokens))
    mask[len(tokens) - len(words) // 2 - 1 : -1] = 1.0  # the answer
    return Sample(tokens, tokens.roll(-1), mask, images, "mock")

"""Models to time, and microbatches like those of training.

Pixels and words are random, since speed does not depend on them. It depends on lengths, tilings
and the share of samples without image, which are drawn as in a data set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from megatron_mm.config import RunConfig, preset
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.collate import collate
from megatron_mm.data.images import choose_grid, cut_tiles
from megatron_mm.data.sample import Sample, SampleImage
from megatron_mm.data.tiles import ImageSettings, image_settings, tiles_by_images


@dataclass(frozen=True)
class Shape:
    """Make-up of a model's microbatches."""

    samples: int
    words: tuple[int, int]  # fewest and most text tokens of a sample
    tiles: int  # most tiles of an image, without thumbnail
    text_only: float  # share of samples without an image


SHAPES = {
    "tiny": Shape(samples=16, words=(16, 64), tiles=9, text_only=0.125),
    "small": Shape(samples=6, words=(32, 256), tiles=4, text_only=0.2),
}


def make_run(name: str, **fusion: str) -> RunConfig:
    """Returns a run of a preset with a constant learning rate and without the balancing loss, which
    transformers averages in another way."""
    run = RunConfig(model=preset(name))
    run.model.language.moe_aux_loss_coeff = 0.0
    run.data.max_num_tiles = SHAPES[name].tiles
    run.optimizer.lr, run.optimizer.lr_decay_style = 1e-4, "constant"
    run.training.train_iters = 1_000_000
    for key, value in fusion.items():
        setattr(run.model.fusion, key, value)
    return run


def image_token(run: RunConfig) -> int:
    """Id of image tokens: the last of the vocabulary, which no word uses."""
    return run.model.language.vocab_size - 1


def make_samples(run: RunConfig, shape: Shape, seed: int) -> list[Sample]:
    """Draws samples. A seed gives the same images and words for any stream and memory."""
    rng = np.random.default_rng(seed)
    settings = image_settings(run)
    assert settings is not None, "the measured models see"
    samples = []
    for index in range(shape.samples):
        words = rng.integers(0, image_token(run), rng.integers(*shape.words, endpoint=True))
        sides = rng.integers(1, round(shape.tiles**0.5) + 1, 2) * settings.image_size
        pixels = rng.integers(0, 256, (sides[1], sides[0], 3), dtype=np.uint8)
        with_image = rng.random() >= shape.text_only
        question = len(words) // 2
        tokens, images = list(words[:question]), []
        if with_image:
            image = cut_image(Image.fromarray(pixels), settings, len(tokens))
            tokens += [image_token(run)] * (len(image.stream) * settings.tokens_per_tile)
            images.append(image)
        tokens = torch.tensor([*tokens, *words[question:]], dtype=torch.int64)
        labels, mask = tokens.roll(-1), torch.zeros(len(tokens))
        mask[len(tokens) - (len(words) - question) - 1 : -1] = 1.0  # the answer
        samples.append(Sample(tokens, labels, mask, images, f"synthetic:{index}"))
    return samples


def cut_image(image: Image.Image, settings: ImageSettings, start: int) -> SampleImage:
    grid = choose_grid(
        *image.size,
        image_size=settings.image_size,
        max_num_tiles=settings.max_num_tiles,
        use_thumbnail=settings.use_thumbnail,
    )
    cut = cut_tiles(image, grid, settings.image_size)
    by_key = tiles_by_images(grid, settings).items()
    tiles = {key: np.ascontiguousarray(cut[used]) for key, used in by_key}
    return SampleImage.build(grid, tiles, settings, start)


def make_batch(run: RunConfig, samples: list[Sample]) -> Microbatch:
    return collate(samples, settings=image_settings(run), pad_id=0)
